# SPDX-License-Identifier: Apache-2.0
"""From the settings of an online job to prompts, and to the sizes of rollouts and of the work on them."""

import logging
from dataclasses import replace

from nemo_aligner.algorithms.rollout import PromptSource, RolloutSettings
from nemo_aligner.builders.loaders import longest_sequence
from nemo_aligner.builders.models import Pretrained, require_tokenizer
from nemo_aligner.config.ppo import ActorJob
from nemo_aligner.data.collate import uncollated
from nemo_aligner.data.data_spec import Split
from nemo_aligner.data.datasets import open_prompt_rows
from nemo_aligner.data.loader import BatchLoader
from nemo_aligner.data.sampler import GlobalBatchSampler
from nemo_aligner.data.tokenizer import Tokenizer
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.models.sampling_config import SamplingConfig
from nemo_aligner.parallel import world
from nemo_aligner.run.progress import heartbeat

logger = logging.getLogger(__name__)

_ROWS_LOOKED_AT = 1000  # of the training prompts, spread over all of them


def longest_rollout(job: ActorJob, pretrained: Pretrained[GPTPolicy]) -> int:
    """Positions of a prompt and its response, at most."""
    gpt, remote = pretrained.learner.model.gpt_config, job.remote_critic_rm
    padded = remote.pad_to_length if remote else None
    limits = {
        "model.encoder_seq_length": gpt.encoder_seq_length,
        "remote_critic_rm.pad_to_length": padded or gpt.encoder_seq_length,
    }
    setting, asked = min(limits.items(), key=lambda item: item[1])
    return longest_sequence(setting, asked, gpt, job.model.length_multiple)


def rollout_sampling(job: ActorJob, pretrained: Pretrained[GPTPolicy]) -> SamplingConfig:
    """How responses are drawn; where the settings leave their length open, at most half of the positions."""
    half = longest_rollout(job, pretrained) // 2
    return job.model.ppo.sampling(max_length=half, seed=job.model.seed)


def actor_rollouts(job: ActorJob, pretrained: Pretrained[GPTPolicy]) -> RolloutSettings:
    """The sizes of a rollout, and of the work on it."""
    model = job.model
    return RolloutSettings(
        config=model.ppo,
        num_rows=job.rollout_rows[0],
        sampling=rollout_sampling(job, pretrained),
        global_batch_size=model.global_batch_size,
        micro_batch_size=model.micro_batch_size,
        length_multiple=model.length_multiple,
        seed=model.seed,
        decode=require_tokenizer(job, pretrained).decode,
        end_ids=pretrained.learner.end_ids,
    )


@world.phase("reading data")
def actor_prompts(
    job: ActorJob, pretrained: Pretrained[GPTPolicy]
) -> tuple[PromptSource, PromptSource | None]:
    """Prompts of training and of validation.

    Raises:
        UserError: there is no tokenizer, a file cannot be used, or there are too few prompts for a rollout.
    """
    tokenizer, config, splits = require_tokenizer(job, pretrained), job.model.ppo, job.model.data.splits
    with heartbeat("reading data", enabled=world.is_logging_rank()):
        train = _prompts(job, splits.train, tokenizer, pretrained, size=config.num_prompts, shuffle=True)
        validation = None
        if job.trainer.ppo.val_check_interval and splits.validation is not None:
            size = config.num_val_samples or config.num_rollout_samples
            validation = _prompts(job, splits.validation, tokenizer, pretrained, size=size, shuffle=False)
    found = len(train.dataset)
    if found < config.num_prompts:
        each = config.num_responses_per_prompt
        of = f" / model.ppo.num_responses_per_prompt={each}" if each > 1 else ""
        raise UserError(
            f"model.data.data_prefix has {found} prompts for training, fewer than "
            f"model.ppo.num_rollout_samples={config.num_rollout_samples}{of}",
            fix=f"give more prompts, or set model.ppo.num_rollout_samples to at most {found * each}",
        )
    if world.is_logging_rank():
        _warn_of_idle_rewards(job, train)
        others = f" and {len(validation.dataset)} validation" if validation else ""
        logger.info("%d training%s prompts; the first:\n%s", found, others, train.dataset[0].text)
    return train, validation


def _warn_of_idle_rewards(job: ActorJob, train: PromptSource) -> None:
    """Warn of rewards whose ``rows`` match no prompt, as a mistyped one would leave them out in silence."""
    left = {name: reward for name, reward in job.trainer.ppo.rewards.items() if reward.rows}
    looked = range(0, len(train.dataset), max(1, len(train.dataset) // _ROWS_LOOKED_AT))
    for index in looked:
        if not left:
            return
        row = train.dataset[index].extras
        left = {name: reward for name, reward in left.items() if not reward.applies_to(row)}
    for name, reward in left.items():
        logger.warning(
            "trainer.ppo.rewards.%s.rows=%s match none of %d training prompts that were looked at",
            *(name, reward.rows, len(looked)),
        )


def _prompts(
    job: ActorJob,
    split: Split,
    tokenizer: Tokenizer,
    pretrained: Pretrained[GPTPolicy],
    *,
    size: int,
    shuffle: bool,
) -> PromptSource:
    data, sampling = job.model.data, rollout_sampling(job, pretrained)
    if job.model.ppo.sampling_params.add_BOS:
        data = replace(data, add_bos=True)
    longest = longest_rollout(job, pretrained)
    room = min(data.seq_length or longest, longest) - sampling.max_length
    if room < 1:
        raise UserError(
            f"model.ppo.length_params.max_length={sampling.max_length} leaves no room for a prompt in "
            f"{longest} tokens",
            fix="set it lower, or model.encoder_seq_length (and remote_critic_rm.pad_to_length) higher",
        )
    dataset = open_prompt_rows(data, split, tokenizer, max_length=room)
    return BatchLoader(
        dataset,
        GlobalBatchSampler(
            len(dataset),
            min(size, len(dataset)),
            shuffle=shuffle,
            seed=job.model.seed,
            drop_last=True,
            blend=dataset.blend,
        ),
        collate=uncollated,
        pads=False,
        dp_rank=world.dp_rank(),
        dp_size=world.dp_size(),
        micro_batch_size=1,
        pad_id=tokenizer.pad_id,
        multiple=1,
        max_length=room,
        num_workers=data.num_workers,
    )
