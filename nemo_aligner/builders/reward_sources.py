# SPDX-License-Identifier: Apache-2.0
"""From the settings of an online job to what rewards its responses: functions, judges, and servers of other jobs."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from nemo_aligner.algorithms.episodes import Environments
from nemo_aligner.algorithms.judge import Judge
from nemo_aligner.algorithms.ppo_config import JudgeConfig
from nemo_aligner.algorithms.rewards import CalledReward, open_called
from nemo_aligner.algorithms.scoring import RewardSources
from nemo_aligner.builders.connections import open_servers
from nemo_aligner.builders.models import Pretrained, require_tokenizer
from nemo_aligner.builders.rollouts import longest_rollout, rollout_sampling
from nemo_aligner.checkpoint.trainer_state import Checkpoint
from nemo_aligner.config.ppo import ActorJob
from nemo_aligner.data.requests import plain_prompt, tokens_of
from nemo_aligner.environments.evaluation import read_template
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.run.experiment import Experiment

logger = logging.getLogger(__name__)


@contextmanager
def open_sources(
    job: ActorJob, run: Experiment, pretrained: Pretrained[GPTPolicy], start: Checkpoint | None
) -> Iterator[RewardSources]:
    """The sources of rewards, once servers are up and compatible; after a good run the servers are stopped.

    Raises:
        UserError: a server does not come up, the jobs do not fit each other, or a function is not there.
    """
    config = job.trainer.ppo
    called = {name: reward for name, reward in config.rewards.items() if reward.called is not None}
    judges = {
        name: _judge(job, pretrained, reward.judge, setting=f"trainer.ppo.rewards.{name}.judge")
        for name, reward in config.rewards.items()
        if reward.judge is not None
    }
    slots = job.model.ppo.rollout_micro_batch_size
    with (
        open_called(called, setting="trainer.ppo.rewards.{}.{}", at_once=slots) as opened,
        open_servers(job, run, pretrained, start) as served,
    ):
        functions = {name: one for name, one in opened.items() if one.config.function is not None}
        others = {name: one for name, one in opened.items() if name not in functions}
        environments = _environments(job, pretrained, others) if others else None
        yield replace(served, functions=functions, judges=judges, environments=environments)


def _environments(
    job: ActorJob, pretrained: Pretrained[GPTPolicy], called: Mapping[str, CalledReward]
) -> Environments:
    return Environments(
        called=called,
        tokenizer=require_tokenizer(job, pretrained),
        end_ids=pretrained.learner.end_ids,
        end_strings=rollout_sampling(job, pretrained).end_strings,
        places=longest_rollout(job, pretrained),
        seed=job.model.seed,
        async_turns=job.trainer.ppo.async_turns,
    )


def _judge(job: ActorJob, pretrained: Pretrained[GPTPolicy], config: JudgeConfig, *, setting: str) -> Judge:
    """The policy as a judge; a question is a turn of the chat template, where the tokenizer has one."""
    tokenizer = require_tokenizer(job, pretrained)

    def encode(question: str) -> list[int]:
        chats = tokenizer.chat_template is not None
        return tokens_of([{"role": "user", "content": question}] if chats else question, tokenizer)

    return Judge(
        policy=pretrained.learner,
        config=config,
        block=setting,
        template=read_template(config.template, setting=f"{setting}.template"),
        encode=encode,
        decode=tokenizer.decode,
        shown=plain_prompt,
        end_strings=rollout_sampling(job, pretrained).end_strings,
        seed=job.model.seed,
        slots=job.model.ppo.rollout_micro_batch_size,
        positions=pretrained.learner.model.gpt_config.max_position_embeddings,
    )
