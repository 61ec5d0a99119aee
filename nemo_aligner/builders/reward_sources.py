# SPDX-License-Identifier: Apache-2.0
"""From the settings of an online job to what rewards its responses: functions, judges, and servers of other jobs."""

import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from nemo_aligner.algorithms.critic_link import PPOState
from nemo_aligner.algorithms.episodes import Environments
from nemo_aligner.algorithms.judge import Judge
from nemo_aligner.algorithms.ppo_config import JudgeConfig
from nemo_aligner.algorithms.rewards import CalledReward, open_called
from nemo_aligner.algorithms.scoring import RewardSources
from nemo_aligner.builders.models import Pretrained, require_tokenizer
from nemo_aligner.builders.rollouts import longest_rollout, rollout_sampling
from nemo_aligner.checkpoint.trainer_state import Checkpoint, read_extra
from nemo_aligner.config.ppo import ActorJob, CriticRemoteConfig, RemoteConfig, RewardRemoteConfig
from nemo_aligner.data.requests import plain_prompt, tokens_of
from nemo_aligner.data.tokenizer import tokenizer_probe
from nemo_aligner.environments.evaluation import read_template
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.parallel import world
from nemo_aligner.run.experiment import Experiment
from nemo_aligner.serving.client import CriticNames, RemoteCritic, RemoteReward, ServerAddress
from nemo_aligner.serving.compatibility import Actor, compare
from nemo_aligner.serving.proxies import CriticProxy, CriticUnavailable, PendingReply, RewardProxy

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
        _open_servers(job, run, pretrained, start) as served,
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


@contextmanager
def _open_servers(
    job: ActorJob, run: Experiment, pretrained: Pretrained[GPTPolicy], start: Checkpoint | None
) -> Iterator[RewardSources]:
    """The critic, or a reward model without one; nothing where neither is asked. Rank 0 alone talks to them."""
    remote, talks = job.remote_critic_rm, world.is_logging_rank()
    if remote is not None and job.trainer.ppo.asks_critic:
        critic = _connect_critic(job, remote, run, start) if talks else None
        with connected(critic, _actor(job, pretrained), stopped=_stopped(remote, critic)):
            yield RewardSources(critic=CriticProxy(critic))
    elif remote is not None and job.rewards_served_by is not None:
        reward = _connect_reward(remote) if talks else None
        with connected(reward, _actor(job, pretrained), stopped=_stopped(remote, reward)):
            yield RewardSources(reward=RewardProxy(reward))
    else:
        yield RewardSources()


@contextmanager
def connected(
    server: RemoteCritic | RemoteReward | None,
    actor: Actor,
    *,
    stopped: Sequence[RemoteCritic | RemoteReward],
) -> Iterator[None]:
    """From when the servers are up and compatible, as every rank hears, until they are let go.

    Args:
        server: on rank 0, elsewhere None; the one that it asks is looked at too.
        actor: what the servers must fit.
        stopped: of both those that are asked to end after a good run.

    Raises:
        UserError: a server does not come up in time, or does not fit.
    """
    try:
        heard: PendingReply[None] = PendingReply(
            server.submit(lambda: _compare(actor, server)) if server else None
        )
        try:
            heard.result()
        except CriticUnavailable as lost:
            raise lost.error from lost
        yield
        _stop(stopped)
    finally:
        if server is not None:
            server.close()


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


def _servers(server: RemoteCritic | RemoteReward) -> list[RemoteCritic | RemoteReward]:
    """All jobs that this one asks."""
    apart = server.reward if isinstance(server, RemoteCritic) else None
    return [server] if apart is None else [server, apart]


def _stopped(
    config: RemoteConfig, server: RemoteCritic | RemoteReward | None
) -> list[RemoteCritic | RemoteReward]:
    """Of the jobs that this one asks, those that end with its run."""
    asked = {True: config.critic.stop_at_end, False: config.reward_model.stop_at_end}
    return [one for one in _servers(server) if asked[isinstance(one, RemoteCritic)]] if server else []


def _actor(job: ActorJob, pretrained: Pretrained[GPTPolicy]) -> Actor:
    return Actor(
        vocab_size=pretrained.learner.model.gpt_config.vocab_size,
        longest=longest_rollout(job, pretrained),
        tokenizer=tokenizer_probe(pretrained.tokenizer),
        request_rows=job.model.ppo.num_rollout_samples,
        request_rows_setting="model.ppo.num_rollout_samples",
        saves=job.exp_manager.create_checkpoint_callback,
        needs_rewards=job.rewards_served_by == "critic",
    )


def _compare(actor: Actor, server: RemoteCritic | RemoteReward) -> None:
    for one in _servers(server):
        for slow in compare(one.name, one.health(), actor):
            logger.warning("%s", slow)
        logger.info("%s is up", one.name)


def _stop(servers: Sequence[RemoteCritic | RemoteReward]) -> None:
    for one in servers:
        try:
            heard = one.stop()
        except UserError as error:
            # The run is finished, whatever a server says.
            logger.warning("%s was asked to end: %s", one.name, error)
        else:
            if not heard:
                logger.warning("%s did not hear that it may end: end it by SIGTERM", one.name)


def _connect_reward(config: RemoteConfig) -> RemoteReward:
    return RemoteReward(
        _remote(config, "reward_model", config.reward_model, script="serve_reward_model.py"),
        name=config.reward_model.name,
        pad_to_length=config.pad_to_length,
    )


def _connect_critic(
    job: ActorJob, config: RemoteConfig, run: Experiment, start: Checkpoint | None
) -> RemoteCritic:
    """The critic's job, and that of the reward model where it is apart."""
    known = start.algorithm(PPOState) if start else None
    names, served_by = config.critic.name, job.rewards_served_by
    critic = RemoteCritic(
        _remote(config, "critic", config.critic, script="serve_ppo_critic.py"),
        run_id=(known and known.run_id) or _run_id(run.folder),
        names=CriticNames(
            infer=names.infer, train=names.train, save=names.save, gives_rewards=served_by is not None
        ),
        reward=_connect_reward(config) if served_by == "reward_model" else None,
        pad_to_length=config.pad_to_length,
        sequence=known.critic_sequence if known else 0,
    )
    if start is not None and (requests := read_extra(start)):
        critic.restore(requests)
    return critic


def _run_id(folder: Path) -> str:
    """The name under which the critic knows this run: one for the folder, whatever is restarted."""
    path = folder / "run_id"
    if not path.exists():
        fresh = path.with_suffix(".tmp")
        fresh.write_text(secrets.token_hex(8))
        fresh.replace(path)
    return path.read_text()


def _remote(
    config: RemoteConfig, block: str, server: CriticRemoteConfig | RewardRemoteConfig, *, script: str
) -> ServerAddress:
    return ServerAddress(
        setting=f"remote_critic_rm.{block}",
        job=script,
        ip=server.ip,
        port=server.port,
        start_seconds=config.start_timeout,
        return_seconds=config.return_timeout,
        timeout_seconds=config.reply_timeout,
    )
