# SPDX-License-Identifier: Apache-2.0
"""From the data settings to batches, and what is to be learned of them."""

import functools
import logging
from dataclasses import replace
from typing import Any

from nemo_aligner.batch import TokenBatch
from nemo_aligner.builders.models import Pretrained, needed_tokenizer, pin_clock
from nemo_aligner.checkpoint.tokenizer_files import chat_template_file
from nemo_aligner.config.reward import RMJob, RMModelConfig
from nemo_aligner.config.sft import SFTJob, SFTModelConfig
from nemo_aligner.data.collate import (
    collate,
    collate_comparisons,
    collate_scored,
    collate_scored_pairs,
    empty_comparison,
    empty_sample,
    empty_scored,
    empty_scored_pair,
)
from nemo_aligner.data.config import SFTDataConfig, SFTSplitConfig
from nemo_aligner.data.datasets import (
    open_comparisons,
    open_regression,
    open_regression_pairs,
    open_sft,
    uses_prompt_tokens,
)
from nemo_aligner.data.loader import BatchLoader
from nemo_aligner.data.markers import marker_template
from nemo_aligner.data.prefix import Split
from nemo_aligner.data.sample import Sample, describe
from nemo_aligner.data.sampler import GlobalBatchSampler
from nemo_aligner.data.tokenizer import Tokenizer
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.critic import GPTCritic
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.objectives.protocol import Objective
from nemo_aligner.objectives.reward import AttributePairs, BradleyTerry, Regression
from nemo_aligner.parallel import world
from nemo_aligner.run.progress import heartbeat

logger = logging.getLogger(__name__)


SFTLoader = BatchLoader[Sample, TokenBatch]


@world.phase("reading data")
def sft_loaders(job: SFTJob, pretrained: Pretrained[GPTPolicy]) -> tuple[SFTLoader, dict[str, SFTLoader]]:
    """Training batches, and those of validation by name; the first training sample is shown.

    Raises:
        UserError: there is no tokenizer, or a file has a bad line.
    """
    model, data, tokenizer = job.model, job.model.data, needed_tokenizer(job, pretrained)
    gpt, multiple = pretrained.learner.model.gpt_config, model.length_multiple
    if data.chat:
        pin_clock(tokenizer, pretrained.config, data.chat_date)
    with heartbeat("reading data", enabled=world.is_logging_rank()):
        loaders: dict[str, SFTLoader] = {}
        for name, split in {"train_ds": data.train_ds, **data.validation}.items():
            setting = f"model.data.{name}.max_seq_length"
            longest = longest_sequence(setting, split.max_seq_length, gpt, multiple)
            loaders[name] = _loader(data, replace(split, max_seq_length=longest), tokenizer, model)
    train, validation = loaders.pop("train_ds"), loaders.pop("validation_ds", None)
    if data.chat:
        _keep_markers(data, tokenizer, pretrained)
    if world.is_logging_rank():
        shown = describe(train.dataset[0], tokenizer)
        logger.info("first training sample, learned tokens between ⟦ and ⟧:\n%s", shown)
        logger.info(
            "%d training and %s validation samples",
            len(train.dataset),
            len(validation.dataset) if validation else "no",
        )
    return train, {"validation": validation} if validation else {}


def _keep_markers(data: SFTDataConfig, tokenizer: Tokenizer, pretrained: Pretrained[GPTPolicy]) -> None:
    """Have the model saved with a chat template that writes the prompt tokens that it is trained with, if it is."""
    if not uses_prompt_tokens(data, tokenizer):
        if world.is_logging_rank():
            logger.info("conversations are laid out by the tokenizer's chat template")
        return
    bos = data.train_ds.add_bos
    template = marker_template(
        data.chat_prompt_tokens, starts_with_bos=tokenizer.adds_bos if bos is None else bos
    )
    if world.is_logging_rank():
        instead = "" if tokenizer.chat_template in (None, template) else " instead of the tokenizer's own"
        logger.info(
            "conversations are laid out by model.data.chat_prompt_tokens, which the model is saved with as its "
            "chat template%s",
            instead,
        )
    tokenizer.use_chat_template(template)
    pretrained.files[chat_template_file(pretrained.config["tokenizer"])] = template.encode()


def longest_sequence(setting: str, asked: int, gpt: GPTConfig, multiple: int) -> int:
    """Tokens of the longest sequence that the model takes, a multiple of ``multiple``, at most ``setting``'s ``asked``.

    Raises:
        UserError: the model has fewer learned positions.
    """
    longest = min(asked, gpt.encoder_seq_length)
    if gpt.position_embedding_type == "learned_absolute" and longest > gpt.max_position_embeddings:
        raise UserError(
            f"sequences of {longest} tokens ({setting}={asked}, model.encoder_seq_length="
            f"{gpt.encoder_seq_length}) are longer than the model's {gpt.max_position_embeddings} learned positions",
            cure=f"set model.encoder_seq_length={gpt.max_position_embeddings}",
        )
    if longest > gpt.max_position_embeddings and world.is_logging_rank():
        _warn_of_positions(longest, setting, asked, gpt.max_position_embeddings)
    return longest // multiple * multiple


@functools.cache
def _warn_of_positions(longest: int, setting: str, asked: int, positions: int) -> None:
    """Once, however many datasets there are."""
    logger.warning(
        "sequences may have %d tokens (%s=%d), and the model was made for %d positions (max_position_embeddings): "
        "further ones are new to it; set model.encoder_seq_length=%d, or stretch the model by "
        "++model.max_position_embeddings and ++model.rope_scaling",
        *(longest, setting, asked, positions, positions),
    )


def _loader(
    data: SFTDataConfig, split: SFTSplitConfig, tokenizer: Tokenizer, model: SFTModelConfig
) -> SFTLoader:
    dataset = open_sft(data, split, tokenizer, answer_only_loss=model.answer_only_loss)
    sampler = GlobalBatchSampler(
        len(dataset),
        split.global_batch_size,
        shuffle=split.shuffle,
        seed=model.seed,
        drop_last=split.drop_last,
    )
    return SFTLoader(
        dataset,
        sampler,
        collate=collate,
        filler=empty_sample(tokenizer.pad_id),
        dp_rank=world.dp_rank(),
        dp_size=world.dp_size(),
        micro_batch_size=split.micro_batch_size,
        pad_id=tokenizer.pad_id,
        multiple=model.length_multiple,
        max_length=split.max_seq_length,
        one_length=world.pp_size() > 1,
        num_workers=data.num_workers,
    )


def reward_objective(model: RMModelConfig) -> Objective:
    """What the reward model is to learn."""
    match model.reward_model_type, model.regression.loss_func:
        case "regression", "regression":
            return Regression()
        case "regression", name:
            return AttributePairs(name)
        case _:
            return BradleyTerry()


@world.phase("reading data")
def reward_loaders(
    job: RMJob, pretrained: Pretrained[GPTCritic]
) -> tuple[BatchLoader, dict[str, BatchLoader]]:
    """Training batches of pairs, or of judged answers, and those of each validation set.

    Raises:
        UserError: there is no tokenizer, or a file cannot be used.
    """
    tokenizer, config, gpt = (
        needed_tokenizer(job, pretrained),
        job.trainer.rm,
        pretrained.learner.model.gpt_config,
    )
    splits = job.model.data.splits
    sets = {"validation": splits.validation} if splits.validation else {}
    sets |= splits.extra_validation
    with heartbeat("reading data", enabled=world.is_logging_rank()):
        train = _reward_loader(
            job, splits.train, tokenizer, gpt, shuffle=config.train_random_sampler, drop_last=True
        )
        validation = {
            name: _reward_loader(
                job, split, tokenizer, gpt, shuffle=config.val_random_sampler, drop_last=False
            )
            for name, split in sets.items()
        }
    if world.is_logging_rank():
        counts = ", ".join(f"{len(loader.dataset)} {name}" for name, loader in validation.items())
        counts = counts or "no validation"
        logger.info("%d training and %s samples", len(train.dataset), counts)
    return train, validation


def _reward_loader(
    job: RMJob, split: Split, tokenizer: Tokenizer, gpt: GPTConfig, *, shuffle: bool, drop_last: bool
) -> BatchLoader[Any, Any]:
    model, regression = job.model, job.model.regression
    longest = longest_sequence(
        "model.data.seq_length", model.data.seq_length or gpt.encoder_seq_length, gpt, model.length_multiple
    )
    labels = {"num_attributes": regression.num_attributes, "missing": regression.loss_mask_val}
    collated: Any
    filler: Any
    match reward_objective(model):
        case Regression():
            dataset = open_regression(model.data, split, tokenizer, max_length=longest, **labels)
            collated, filler = collate_scored, empty_scored(tokenizer.pad_id, regression.num_attributes)
        case AttributePairs():
            dataset = open_regression_pairs(model.data, split, tokenizer, max_length=longest, **labels)
            collated, filler = (
                collate_scored_pairs,
                empty_scored_pair(tokenizer.pad_id, regression.num_attributes),
            )
        case _:
            dataset = open_comparisons(model.data, split, tokenizer, max_length=longest)
            collated, filler = collate_comparisons, empty_comparison(tokenizer.pad_id)
    sampler = GlobalBatchSampler(
        len(dataset),
        model.global_batch_size,
        shuffle=shuffle,
        seed=model.seed,
        drop_last=drop_last,
        blend=dataset.blend,
    )
    return BatchLoader(
        dataset,
        sampler,
        collate=collated,
        filler=filler,
        dp_rank=world.dp_rank(),
        dp_size=world.dp_size(),
        micro_batch_size=model.micro_batch_size,
        pad_id=tokenizer.pad_id,
        multiple=model.length_multiple,
        max_length=longest,
        one_length=world.pp_size() > 1,
        num_workers=model.data.num_workers,
    )
