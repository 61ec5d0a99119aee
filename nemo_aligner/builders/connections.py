# SPDX-License-Identifier: Apache-2.0
"""From the settings of an online job to its connections with other jobs: a critic, and reward models."""

import logging
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nemo_aligner.algorithms.critic_link import PPOState
from nemo_aligner.algorithms.ppo_config import RewardRemoteConfig, RewardServerConfig, TimesConfig
from nemo_aligner.algorithms.scoring import RewardSources
from nemo_aligner.builders.models import Pretrained
from nemo_aligner.builders.rollouts import longest_rollout
from nemo_aligner.checkpoint.trainer_state import Checkpoint, read_extra
from nemo_aligner.config.ppo import ActorJob, CriticRemoteConfig, RemoteConfig
from nemo_aligner.data.tokenizer import tokenizer_probe
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.parallel import world
from nemo_aligner.run.experiment import Experiment
from nemo_aligner.serving.client import CriticNames, RemoteCritic, RemoteReward, ServerAddress
from nemo_aligner.serving.compatibility import Actor, compare
from nemo_aligner.serving.proxies import CriticProxy, CriticUnavailable, PendingReply, RewardProxy

logger = logging.getLogger(__name__)


@contextmanager
def open_servers(
    job: ActorJob, run: Experiment, pretrained: Pretrained[GPTPolicy], start: Checkpoint | None
) -> Iterator[RewardSources]:
    """The critic and reward models of other jobs, once they are up and compatible; rank 0 alone talks to them.

    After a good run those that end with it are stopped.

    Raises:
        UserError: one does not come up, or does not fit.
    """
    remote, config, talks = job.remote_critic_rm, job.trainer.ppo, world.is_logging_rank()
    actor, critic = _actor(job, pretrained), None
    rewards: dict[str, RewardProxy] = {}
    with ExitStack() as stack:
        if remote is not None and config.asks_critic:
            server = _connect_critic(job, remote, run, start) if talks else None
            stack.enter_context(connected(server, actor, stopped=_stopped(remote, server)))
            critic = CriticProxy(server)
        elif remote is not None and config.served_reward is not None:
            server = _connect_reward(remote) if talks else None
            stack.enter_context(connected(server, actor, stopped=_stopped(remote, server)))
            rewards[config.served_reward] = RewardProxy(server)
        for name, reward in config.rewards.items():
            if reward.server is not None:
                server = _connect_own(job, name, reward.server) if talks else None
                stopped = [server] if server and reward.server.stop_at_end else []
                stack.enter_context(connected(server, actor, stopped=stopped))
                rewards[name] = RewardProxy(server)
        yield RewardSources(critic=critic, servers=rewards)


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
    server = config.reward_model
    return RemoteReward(
        _address("remote_critic_rm.reward_model", server, config),
        name=server.name,
        pad_to_length=config.pad_to_length,
    )


def _connect_own(job: ActorJob, name: str, server: RewardServerConfig) -> RemoteReward:
    """The server of one reward."""
    remote = job.remote_critic_rm
    return RemoteReward(
        _address(f"trainer.ppo.rewards.{name}.server", server, server),
        name=server.name,
        pad_to_length=remote.pad_to_length if remote else None,
    )


def _connect_critic(
    job: ActorJob, config: RemoteConfig, run: Experiment, start: Checkpoint | None
) -> RemoteCritic:
    """The critic's job, and that of the reward model where it is apart."""
    known = start.algorithm(PPOState) if start else None
    names, served_by = config.critic.name, job.rewards_served_by
    critic = RemoteCritic(
        _address("remote_critic_rm.critic", config.critic, config),
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


def _address(
    setting: str, server: CriticRemoteConfig | RewardRemoteConfig, times: TimesConfig
) -> ServerAddress:
    return ServerAddress(
        setting=setting,
        job="serve_ppo_critic.py" if isinstance(server, CriticRemoteConfig) else "serve_reward_model.py",
        ip=server.ip,
        port=server.port,
        start_seconds=times.start_timeout,
        return_seconds=times.return_timeout,
        timeout_seconds=times.reply_timeout,
    )
