# SPDX-License-Identifier: Apache-2.0
"""The settings of the scripts of the online loop: PPO's actor, and those that ask no critic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from nemo_aligner.algorithms.ppo_config import PPOConfig, RewardRemoteConfig, RolloutConfig, TimesConfig
from nemo_aligner.bounds import only
from nemo_aligner.config.base import BatchedModelConfig, PretrainedJob, TrainerConfig
from nemo_aligner.data.config import PromptDataConfig
from nemo_aligner.data.first_rows import check_prompt_rows
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.learning_rate import OptimConfig, SchedConfig
from nemo_aligner.objectives.config import BY_REWARDS, GROUPED, RewardEstimator
from nemo_aligner.run.experiment import CheckpointCallbackConfig, ExperimentConfig


@dataclass(frozen=True, kw_only=True)
class TrtLlmConfig:
    """The ``trainer.ppo.trt_llm`` block: only off."""

    enable: bool = only(False, what="TensorRT-LLM")  # only False: the model that learns writes
    reshard: bool = False
    max_input_len: int | None = None
    seed: int | None = None
    model_type: str = "llama"
    unload_engine_train: bool = False


@dataclass(frozen=True, kw_only=True)
class ActorConfig(PPOConfig):
    """The ``trainer.ppo`` block."""

    # gae asks a critic; reinforce does not; group, leave_one_out and best_of_n compare responses
    advantage_estimator: RewardEstimator = "gae"
    trt_llm: TrtLlmConfig = field(default_factory=TrtLlmConfig)  # TensorRT-LLM
    model_gbs: int | None = None  # only as model.global_batch_size
    model_mbs: int | None = None  # only as model.micro_batch_size


@dataclass(frozen=True, kw_only=True)
class ActorTrainerConfig(TrainerConfig):
    """The ``trainer`` block."""

    ppo: ActorConfig = field(default_factory=ActorConfig)  # the loop; docs/ppo_details.md has the formulas


@dataclass(frozen=True, kw_only=True)
class ActorRolloutConfig(RolloutConfig):
    """The ``model.ppo`` block."""

    trt_llm: TrtLlmConfig = field(default_factory=TrtLlmConfig)  # TensorRT-LLM
    # only as remote_critic_rm.combine_rm_and_critic_server
    combine_rm_and_critic_server: bool | None = None


@dataclass(frozen=True, kw_only=True)
class ActorModelConfig(BatchedModelConfig):
    """The ``model`` block."""

    optim: OptimConfig = field(
        default_factory=partial(OptimConfig, lr=9e-7, weight_decay=0.1, sched=SchedConfig(min_lr=9e-8))
    )
    data: PromptDataConfig  # where prompts come from
    ppo: ActorRolloutConfig = field(default_factory=ActorRolloutConfig)  # rollouts, and the policy's loss


@dataclass(frozen=True, kw_only=True)
class CriticNamesConfig:
    """The ``remote_critic_rm.critic.name`` block."""

    train: str = "critic_train"  # learns from a rollout
    infer: str = "critic_infer"  # gives values, and rewards
    save: str = "critic_save"  # saves a checkpoint


@dataclass(frozen=True, kw_only=True)
class CriticRemoteConfig:
    """The ``remote_critic_rm.critic`` block."""

    name: CriticNamesConfig = field(default_factory=CriticNamesConfig)  # the endpoints' names
    ip: str = "localhost"  # its host
    port: int = 5556  # its port
    stop_at_end: bool = True  # ask it to save and end when this run is finished


@dataclass(frozen=True, kw_only=True)
class RemoteConfig(TimesConfig):
    """The ``remote_critic_rm`` block."""

    # tokens that requests are padded to; no prompt and response are longer; null: no padding
    pad_to_length: int | None = None
    # both in the critic's job; False: serve_reward_model.py has the reward model
    combine_rm_and_critic_server: bool = True
    # where combine_rm_and_critic_server is False
    reward_model: RewardRemoteConfig = field(default_factory=RewardRemoteConfig)
    critic: CriticRemoteConfig = field(default_factory=CriticRemoteConfig)  # serve_ppo_critic.py

    def check(self, block: str) -> None:
        """Raise UserError if two servers have one address."""
        if not self.combine_rm_and_critic_server and (self.critic.ip, self.critic.port) == (
            self.reward_model.ip,
            self.reward_model.port,
        ):
            raise UserError(
                f"{block}.critic and {block}.reward_model have one address, {self.critic.ip}:{self.critic.port}, "
                f"and {block}.combine_rm_and_critic_server=False",
                fix=f"set {block}.reward_model.port to that of serve_reward_model.py",
            )


@dataclass(frozen=True, kw_only=True)
class ActorJob(PretrainedJob):
    """All settings of train_gpt_ppo_actor.py."""

    model: ActorModelConfig
    trainer: ActorTrainerConfig = field(default_factory=ActorTrainerConfig)
    exp_manager: ExperimentConfig = field(
        default_factory=partial(
            ExperimentConfig,
            checkpoint_callback_params=CheckpointCallbackConfig(
                monitor="val_rewards",
                save_top_k=1,
                mode="max",
                filename="megatron_gpt-{step}-{consumed_samples}-{ppo_optimization_step}-{epoch}-{val_rewards:.3f}",
            ),
        )
    )
    # where the critic and the reward model are; null: rewards are trainer.ppo.rewards' functions alone
    remote_critic_rm: RemoteConfig | None = field(default_factory=RemoteConfig)
    name: str = "megatron_gpt_ppo_actor"

    @property
    def files(self) -> Mapping[str, Sequence[str]]:
        """See TrainingJob."""
        return {"model.data.data_prefix": self.model.data.splits.paths}

    def check_rows(self) -> None:
        """See TrainingJob."""
        for path in self.model.data.splits.train.paths:
            check_prompt_rows(path)

    @property
    def validates(self) -> bool:
        """See TrainingJob."""
        return self.model.data.splits.validation is not None

    @property
    def asks_initial_policy(self) -> bool:
        """True if the policy as training began is compared with."""
        return bool(self.trainer.ppo.initial_policy_kl_penalty)

    @property
    def rewards_served_by(self) -> Literal["critic", "reward_model"] | None:
        """The block of remote_critic_rm whose server gives rewards; None: functions, judges or a teacher give all."""
        remote, config = self.remote_critic_rm, self.trainer.ppo
        if remote is None or config.served_reward is None:
            return None
        return "critic" if config.asks_critic and remote.combine_rm_and_critic_server else "reward_model"

    @property
    def rollout_rows(self) -> tuple[int, str]:
        """(rows of data that a rollout gives, what they are)."""
        return self.model.ppo.num_rollout_samples, "responses"

    @property
    def teacher(self) -> tuple[str, str] | None:
        """(setting, path) of the model that responses are credited by; None: rewards credit them."""
        return None

    def check(self, world_size: int | None = None) -> None:
        """See TrainingJob."""
        PretrainedJob.check(self, world_size)
        model, remote, rollout = self.model, self.remote_critic_rm, self.model.ppo
        rollout.check("model.ppo")
        if remote is not None:
            remote.check("remote_critic_rm")
        self._check_estimator()
        (rows, unit), step = self.rollout_rows, model.global_batch_size
        if rows % step:
            whole = rollout.num_rollout_samples // rows * (-(-rows // step) * step)
            gives = "" if unit == "responses" else f" gives {rows} {unit}, which"
            raise UserError(
                f"model.ppo.num_rollout_samples={rollout.num_rollout_samples}{gives} is not a multiple of "
                f"model.global_batch_size={step}: a rollout is learned from in whole batches",
                fix=f"set model.ppo.num_rollout_samples={whole}, or another model.global_batch_size",
            )
        self._check_copies()

    def _check_estimator(self) -> None:
        """Raise UserError if the advantage estimator lacks responses to compare, or its critic."""
        config, responses = self.trainer.ppo, self.model.ppo.num_responses_per_prompt
        named = f"trainer.ppo.advantage_estimator={config.advantage_estimator}"
        if config.advantage_estimator in GROUPED and responses < 2:
            raise UserError(
                f"{named} compares responses to one prompt, and model.ppo.num_responses_per_prompt={responses}",
                fix="set model.ppo.num_responses_per_prompt to 2 or more, for instance 8",
            )
        if self.model.ppo.sampling_params.use_greedy and responses > 1:
            raise UserError(
                f"model.ppo.sampling_params.use_greedy=True makes all {responses} responses to a prompt "
                "(model.ppo.num_responses_per_prompt) the same, and there is nothing to compare",
                fix="set model.ppo.sampling_params.use_greedy=False, or one response to a prompt",
            )
        if config.max_sampling_rounds > 1 and config.advantage_estimator not in (*GROUPED, None):
            raise UserError(
                f"trainer.ppo.max_sampling_rounds={config.max_sampling_rounds} replaces groups of equal rewards, and "
                f"{named} compares no responses",
                fix=f"set trainer.ppo.max_sampling_rounds=1, or an estimator of {', '.join(GROUPED)}",
            )
        if config.advantage_estimator == "best_of_n" and config.top_n >= responses:
            raise UserError(
                f"trainer.ppo.top_n={config.top_n} leaves none of model.ppo.num_responses_per_prompt={responses} out",
                fix=f"set trainer.ppo.top_n to {responses - 1} or less",
            )
        if self.remote_critic_rm is not None:
            return
        if config.asks_critic:
            others = ", ".join(name for name in BY_REWARDS if name != config.advantage_estimator)
            raise UserError(
                f"{named} asks a critic, and remote_critic_rm is null",
                fix=f"set trainer.ppo.advantage_estimator to one of {others}, or "
                "leave remote_critic_rm and start serve_ppo_critic.py",
            )
        if config.served_reward is not None:
            raise UserError(
                f"trainer.ppo.rewards has {'a served reward model' if config.rewards else 'no function'}, and "
                "remote_critic_rm is null",
                fix="name a Python function: trainer.ppo.rewards.NAME.function=MODULE.NAME; or leave remote_critic_rm "
                "and start serve_reward_model.py",
            )

    def _check_copies(self) -> None:
        """Settings that NeMo's files repeat under a second name mean one thing."""
        config, model = self.trainer.ppo, self.model
        for name, value, other, counts in (
            ("trainer.ppo.model_gbs", config.model_gbs, "model.global_batch_size", model.global_batch_size),
            ("trainer.ppo.model_mbs", config.model_mbs, "model.micro_batch_size", model.micro_batch_size),
            (
                "model.ppo.combine_rm_and_critic_server",
                model.ppo.combine_rm_and_critic_server,
                "remote_critic_rm.combine_rm_and_critic_server",
                self.remote_critic_rm.combine_rm_and_critic_server if self.remote_critic_rm else None,
            ),
        ):
            if value is not None and value != counts:
                raise UserError(
                    f"{name}={value}, but {other}={counts}, which says the same", fix=f"set {other}={value}"
                )


@dataclass(frozen=True, kw_only=True)
class CriticFreeJob(ActorJob):
    """All settings of a script of the online loop that asks no critic, though it may ask a served reward model."""

    remote_critic_rm: RemoteConfig | None = None
