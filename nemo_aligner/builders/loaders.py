# SPDX-License-Identifier: Apache-2.0
"""From the data settings to batches, and what is to be learned of them."""

import functools
import logging
from dataclasses import replace

from nemo_aligner.algorithms.supervised import Batches, SupervisedData
from nemo_aligner.builders.models import Pretrained, pin_clock, require_tokenizer
from nemo_aligner.checkpoint.tokenizer_files import chat_template_file
from nemo_aligner.config.pairs import PairJob, PairModelConfig
from nemo_aligner.config.reward import RMModelConfig
from nemo_aligner.config.sft import SFTModelConfig, TextJob
from nemo_aligner.data.collate import collate
from nemo_aligner.data.config import SFTDataConfig, SFTSplitConfig
from nemo_aligner.data.data_spec import Split
from nemo_aligner.data.datasets import open_response_rows, open_sft, uses_prompt_tokens
from nemo_aligner.data.loader import BatchLoader, BlendedRows
from nemo_aligner.data.markers import marker_template
from nemo_aligner.data.row import describe
from nemo_aligner.data.sampler import GlobalBatchSampler
from nemo_aligner.data.tokenizer import Tokenizer
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.objectives.protocol import Objective
from nemo_aligner.objectives.reward import AttributePairs, BradleyTerry, Regression
from nemo_aligner.parallel import world
from nemo_aligner.run.progress import heartbeat

logger = logging.getLogger(__name__)


@world.phase("reading data")
def sft_loaders(job: TextJob, pretrained: Pretrained[GPTPolicy]) -> SupervisedData:
    """Training batches, and those of validation by name; the first training sample is shown.

    Raises:
        UserError: there is no tokenizer, or a file has a bad line.
    """
    model, data, tokenizer = job.model, job.model.data, require_tokenizer(job, pretrained)
    gpt, multiple = pretrained.learner.model.gpt_config, model.length_multiple
    if data.chat:
        pin_clock(tokenizer, pretrained.config, data.chat_date)
    with heartbeat("reading data", enabled=world.is_logging_rank()):
        loaders: dict[str, Batches] = {}
        for name, split in {"train_ds": data.train_ds, **data.validation}.items():
            setting = f"model.data.{name}.max_seq_length"
            longest = longest_sequence(setting, split.max_seq_length, gpt, multiple)
            split = replace(split, max_seq_length=longest)
            batches = _batches(
                open_sft(data, split, tokenizer, answer_only_loss=model.answer_only_loss),
                tokenizer,
                model,
                sizes=split,
                max_length=longest,
                shuffle=split.shuffle,
                drop_last=split.drop_last,
            )
            loaders[name] = replace(batches, packing=data.packing)
    train, validation = loaders.pop("train_ds"), loaders.pop("validation_ds", None)
    if data.chat:
        _keep_markers(data, tokenizer, pretrained)
    if world.is_logging_rank():
        shown = describe(train.dataset[0], tokenizer)
        logger.info("first training sample, loss tokens between ⟦ and ⟧:\n%s", shown)
        logger.info(
            "%d training and %s validation samples",
            len(train.dataset),
            len(validation.dataset) if validation else "no",
        )
    return SupervisedData(train=train, validation={"validation": validation} if validation else {})


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
            fix=f"set model.encoder_seq_length={gpt.max_position_embeddings}",
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


def _batches(
    dataset: BlendedRows,
    tokenizer: Tokenizer,
    model: SFTModelConfig | PairModelConfig,
    *,
    sizes: SFTSplitConfig | PairModelConfig,
    max_length: int,
    shuffle: bool,
    drop_last: bool,
) -> Batches:
    """This data parallel rank's batches of a data set."""
    sampler = GlobalBatchSampler(
        len(dataset),
        sizes.global_batch_size,
        shuffle=shuffle,
        seed=model.seed,
        drop_last=drop_last,
        blend=dataset.blend,
    )
    return BatchLoader(
        dataset,
        sampler,
        collate=collate,
        dp_rank=world.dp_rank(),
        dp_size=world.dp_size(),
        micro_batch_size=sizes.micro_batch_size,
        pad_id=tokenizer.pad_id,
        multiple=model.length_multiple,
        max_length=max_length,
        one_length=world.pp_size() > 1,
        num_workers=model.data.num_workers,
    )


def reward_objective(model: RMModelConfig) -> Objective:
    """The objective of the reward model."""
    match model.reward_model_type, model.regression.loss_func:
        case "regression", "regression":
            return Regression()
        case "regression", name:
            return AttributePairs(name)
        case _:
            return BradleyTerry()


@world.phase("reading data")
def pair_loaders(job: PairJob, pretrained: Pretrained, *, generates: bool = False) -> SupervisedData:
    """Training batches of the job's rows of responses, and those of each validation set.

    Args:
        generates: the loss is of the responses' tokens; else of the reward of each whole text.

    Raises:
        UserError: there is no tokenizer, or a file cannot be used.
    """
    model, data, splits = job.model, job.model.data, job.model.data.splits
    tokenizer, gpt = require_tokenizer(job, pretrained), pretrained.learner.model.gpt_config
    longest = longest_sequence(
        "model.data.seq_length", data.seq_length or gpt.encoder_seq_length, gpt, model.length_multiple
    )
    files = job.responses

    def load(split: Split, *, shuffle: bool, drop_last: bool) -> Batches:
        rows = open_response_rows(
            data, split, tokenizer, files=files, max_length=longest, generates=generates
        )
        return _batches(
            rows, tokenizer, model, sizes=model, max_length=longest, shuffle=shuffle, drop_last=drop_last
        )

    sets = {"validation": splits.validation} if splits.validation else {}
    with heartbeat("reading data", enabled=world.is_logging_rank()):
        train = load(splits.train, shuffle=job.loop.train_random_sampler, drop_last=True)
        validation = {
            name: load(split, shuffle=job.loop.val_random_sampler, drop_last=False)
            for name, split in {**sets, **splits.extra_validation}.items()
        }
    if world.is_logging_rank():
        counts = ", ".join(f"{len(loader.dataset)} {name}" for name, loader in validation.items())
        logger.info("%d training and %s samples", len(train.dataset), counts or "no validation")
        if generates:
            shown = describe(train.dataset[0], tokenizer)
            logger.info("first response, its loss tokens between ⟦ and ⟧:\n%s", shown)
    return SupervisedData(train=train, validation=validation)
