# SPDX-License-Identifier: Apache-2.0
"""From the settings of train_gpt_ppo_actor.py to a policy with its initial weights, prompts and a critic."""

import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from nemo_aligner.algorithms.critic_link import PPOState
from nemo_aligner.algorithms.judge import Judge, read_template
from nemo_aligner.algorithms.ppo import OnlineObjective, PPOTrainer
from nemo_aligner.algorithms.ppo_config import JudgeConfig
from nemo_aligner.algorithms.rewards import load_function
from nemo_aligner.algorithms.rollout import PromptSource, RolloutSettings
from nemo_aligner.algorithms.scoring import RewardSources
from nemo_aligner.batch import ReferencedPairs
from nemo_aligner.builders.loaders import longest_sequence
from nemo_aligner.builders.models import Pretrained, go_on_from, load_policy, require_tokenizer
from nemo_aligner.builders.reference import load_teacher
from nemo_aligner.builders.resume import resume_point
from nemo_aligner.builders.runs import open_experiment, prepare_training, save_result, training_checkpoints
from nemo_aligner.checkpoint.trainer_state import Checkpoint, read_extra
from nemo_aligner.config.ppo import ActorJob, CriticRemoteConfig, RemoteConfig, RewardRemoteConfig
from nemo_aligner.data.collate import uncollated
from nemo_aligner.data.data_spec import Split
from nemo_aligner.data.datasets import open_prompt_rows
from nemo_aligner.data.loader import BatchLoader
from nemo_aligner.data.requests import plain_prompt, tokens_of
from nemo_aligner.data.sampler import GlobalBatchSampler
from nemo_aligner.data.tokenizer import Tokenizer, tokenizer_probe
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.models.sampling_config import SamplingConfig
from nemo_aligner.objectives.policy import PolicyGradient
from nemo_aligner.objectives.protocol import Objective
from nemo_aligner.parallel import world
from nemo_aligner.rollout_batch import ScoredRollout
from nemo_aligner.run.experiment import Experiment
from nemo_aligner.run.progress import heartbeat
from nemo_aligner.serving.client import CriticNames, RemoteCritic, RemoteReward, ServerAddress
from nemo_aligner.serving.compatibility import Actor, compare
from nemo_aligner.serving.proxies import CriticProxy, CriticUnavailable, PendingReply, RewardProxy

logger = logging.getLogger(__name__)


def train_actor(
    job: ActorJob,
    *,
    loss: Objective | None = None,
    pairs: Callable[[ScoredRollout], ReferencedPairs] | None = None,
) -> None:
    """Run the job: a policy that learns from its responses, by the job's teacher if it has one.

    Args:
        job: the settings.
        loss: of the policy; None: :func:`policy_gradient`.
        pairs: makes one pair of the responses to each prompt, which ``loss`` is of; None: it is of credited responses.
    """
    with open_experiment(job) as run:
        start = resume_point(job, run)
        if idle := job.trainer.ppo.idle:
            keys = ", ".join(f"trainer.ppo.{name}" for name in idle)
            logger.warning("without effect, as trainer.ppo.initial_policy_kl_penalty is 0: %s", keys)
        pretrained = load_actor(job, start)
        objective = OnlineObjective(
            loss=loss or policy_gradient(job),
            pairs=pairs,
            with_reference=job.asks_initial_policy,
            teacher=load_teacher(job, job.teacher, pretrained, scores=True) if job.teacher else None,
        )
        prompts = actor_prompts(job, pretrained)
        checkpoints = training_checkpoints(job, run, pretrained)
        trainer = PPOTrainer(
            job.trainer.ppo,
            actor_rollouts(job, pretrained),
            pretrained.learner,
            objective,
            prompts,
            run,
            checkpoints,
        )
        prepare_training(job, pretrained, max_steps=trainer.plan.max_steps * trainer.updates.per_rollout)
        if start is not None:
            trainer.resume(start)
        with open_sources(job, run, pretrained, start) as sources:
            trainer.fit(sources)
            save_result(job, run, pretrained, checkpoints)


def load_actor(job: ActorJob, start: Checkpoint | None) -> Pretrained[GPTPolicy]:
    """The policy where ``start`` has it, and beside it the weights that it began with, where they are asked for.

    Raises:
        UserError: a checkpoint is not there, damaged, or does not fit the layout or the overrides.
    """
    if not job.asks_initial_policy:
        return load_policy(job, start=start)
    pretrained = load_policy(job)
    pretrained.learner.keep_reference()
    go_on_from(pretrained, start)
    return pretrained


def _longest(job: ActorJob, pretrained: Pretrained[GPTPolicy]) -> int:
    """Positions of a prompt and its response, at most."""
    gpt, remote = pretrained.learner.model.gpt_config, job.remote_critic_rm
    padded = remote.pad_to_length if remote else None
    limits = {
        "model.encoder_seq_length": gpt.encoder_seq_length,
        "remote_critic_rm.pad_to_length": padded or gpt.encoder_seq_length,
    }
    setting, asked = min(limits.items(), key=lambda item: item[1])
    return longest_sequence(setting, asked, gpt, job.model.length_multiple)


def _sampling(job: ActorJob, pretrained: Pretrained[GPTPolicy]) -> SamplingConfig:
    half = _longest(job, pretrained) // 2
    return job.model.ppo.sampling(max_length=half, seed=job.model.seed)


def actor_rollouts(job: ActorJob, pretrained: Pretrained[GPTPolicy]) -> RolloutSettings:
    """The sizes of a rollout, and of the work on it."""
    model = job.model
    return RolloutSettings(
        config=model.ppo,
        num_rows=job.rollout_rows[0],
        sampling=_sampling(job, pretrained),
        global_batch_size=model.global_batch_size,
        micro_batch_size=model.micro_batch_size,
        length_multiple=model.length_multiple,
        seed=model.seed,
        decode=require_tokenizer(job, pretrained).decode,
        end_ids=pretrained.learner.end_ids,
    )


def policy_gradient(job: ActorJob) -> PolicyGradient:
    """The policy's loss; with trainer.ppo.kl_placement=loss the KL to the initial policy is a part of it."""
    config = job.trainer.ppo
    in_loss = config.kl_placement == "loss"
    return PolicyGradient(
        job.model.ppo,
        kl_coefficient=config.initial_policy_kl_penalty if in_loss else 0.0,
        kl_estimator=config.estimator_of_kl,
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
        others = f" and {len(validation.dataset)} validation" if validation else ""
        logger.info("%d training%s prompts; the first:\n%s", found, others, train.dataset[0].text)
    return train, validation


def _prompts(
    job: ActorJob,
    split: Split,
    tokenizer: Tokenizer,
    pretrained: Pretrained[GPTPolicy],
    *,
    size: int,
    shuffle: bool,
) -> PromptSource:
    data, sampling = job.model.data, _sampling(job, pretrained)
    if job.model.ppo.sampling_params.add_BOS:
        data = replace(data, add_bos=True)
    room = min(data.seq_length or _longest(job, pretrained), _longest(job, pretrained)) - sampling.max_length
    if room < 1:
        raise UserError(
            f"model.ppo.length_params.max_length={sampling.max_length} leaves no room for a prompt in "
            f"{_longest(job, pretrained)} tokens",
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


@contextmanager
def open_sources(
    job: ActorJob, run: Experiment, pretrained: Pretrained[GPTPolicy], start: Checkpoint | None
) -> Iterator[RewardSources]:
    """The sources of rewards, once servers are up and compatible; after a good run the servers are stopped.

    Raises:
        UserError: a server does not come up, the jobs do not fit each other, or a function is not there.
    """
    config, remote = job.trainer.ppo, job.remote_critic_rm
    functions = {
        name: load_function(f"trainer.ppo.rewards.{name}.function", reward.function)
        for name, reward in config.rewards.items()
        if reward.function is not None
    }
    judges = {
        name: _judge(job, pretrained, reward.judge, setting=f"trainer.ppo.rewards.{name}.judge")
        for name, reward in config.rewards.items()
        if reward.judge is not None
    }
    own = RewardSources(functions=functions, judges=judges)
    asks = remote is not None and (config.asks_critic or config.served_reward is not None)
    if remote is None or not asks:
        yield own
        return
    server = _connect(job, remote, run, start) if world.is_logging_rank() else None
    try:
        agreed: PendingReply[None] = PendingReply(
            server.submit(lambda: _compare(job, remote, pretrained, server)) if server else None
        )
        try:
            agreed.result()
        except CriticUnavailable as lost:
            raise lost.error from lost
        if config.asks_critic:
            assert not isinstance(server, RemoteReward)
            yield replace(own, critic=CriticProxy(server))
        else:
            assert not isinstance(server, RemoteCritic)
            yield replace(own, reward=RewardProxy(server))
        if server is not None:
            _stop(remote, server)
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
        end_strings=_sampling(job, pretrained).end_strings,
        seed=job.model.seed,
        slots=job.model.ppo.rollout_micro_batch_size,
        positions=pretrained.learner.model.gpt_config.max_position_embeddings,
    )


def _servers(server: RemoteCritic | RemoteReward) -> list[RemoteCritic | RemoteReward]:
    """All jobs that this one asks."""
    apart = server.reward if isinstance(server, RemoteCritic) else None
    return [server] if apart is None else [server, apart]


def _compare(
    job: ActorJob,
    remote: RemoteConfig,
    pretrained: Pretrained[GPTPolicy],
    server: RemoteCritic | RemoteReward,
) -> None:
    actor = Actor(
        vocab_size=pretrained.learner.model.gpt_config.vocab_size,
        longest=_longest(job, pretrained),
        tokenizer=tokenizer_probe(pretrained.tokenizer),
        request_rows=job.model.ppo.num_rollout_samples,
        request_rows_setting="model.ppo.num_rollout_samples",
        saves=job.exp_manager.create_checkpoint_callback,
        needs_rewards=remote.combine_rm_and_critic_server and job.trainer.ppo.served_reward is not None,
    )
    for one in _servers(server):
        for slow in compare(one.name, one.health(), actor):
            logger.warning("%s", slow)
        logger.info("%s is up", one.name)


def _stop(config: RemoteConfig, server: RemoteCritic | RemoteReward) -> None:
    for one in _servers(server):
        block = config.critic if isinstance(one, RemoteCritic) else config.reward_model
        if not block.stop_at_end:
            continue
        try:
            heard = one.stop()
        except UserError as error:
            # The run is finished, whatever a server says.
            logger.warning("%s was asked to end: %s", one.name, error)
        else:
            if not heard:
                logger.warning("%s did not hear that it may end: end it by SIGTERM", one.name)


def _connect(
    job: ActorJob, config: RemoteConfig, run: Experiment, start: Checkpoint | None
) -> RemoteCritic | RemoteReward:
    known = start.algorithm(PPOState) if start else None
    needs_rewards, asks_critic = job.trainer.ppo.served_reward is not None, job.trainer.ppo.asks_critic
    reward = None
    if needs_rewards and not (asks_critic and config.combine_rm_and_critic_server):
        reward = RemoteReward(
            _remote(config, "reward_model", config.reward_model, script="serve_reward_model.py"),
            name=config.reward_model.name,
            pad_to_length=config.pad_to_length,
        )
    if not asks_critic:
        assert reward is not None, "whoever asks no critic asks a reward model"
        return reward
    names = config.critic.name
    critic = RemoteCritic(
        _remote(config, "critic", config.critic, script="serve_ppo_critic.py"),
        run_id=(known and known.run_id) or _run_id(run.folder),
        names=CriticNames(infer=names.infer, train=names.train, save=names.save, gives_rewards=needs_rewards),
        reward=reward,
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
