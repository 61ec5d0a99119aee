# SPDX-License-Identifier: Apache-2.0
"""The settings of PPO's loop and of its rollouts. Imports no torch, so that they are checked before it is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from nemo_aligner.data.config import unescape
from nemo_aligner.errors import UserError
from nemo_aligner.models.sampling_config import SamplingConfig
from nemo_aligner.objectives.config import CreditConfig, PolicyConfig
from nemo_aligner.run.schedule import LoopConfig

__all__ = ["LengthConfig", "PPOConfig", "RewardConfig", "RolloutConfig", "SamplingParams"]


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """A block of ``trainer.ppo.rewards``."""

    function: str | None = None  # a Python function, MODULE.NAME; null: the served reward model
    weight: float = 1.0  # in the sum that responses are credited by; 0: the reward is only reported


@dataclass(frozen=True, kw_only=True)
class PPOConfig(LoopConfig, CreditConfig):
    """The ``trainer.ppo`` block of an actor."""

    block: ClassVar[str] = "trainer.ppo"
    val_check_interval: int | float = 10  # steps between validations; a float is a share of an epoch
    save_interval: int | float = 10  # steps between checkpoints; a float is a share of an epoch
    num_ppo_epochs: int = 1  # passes over each rollout
    critic_warmup_steps: int = 0  # rollouts that only the critic learns from, before the first step
    rollout_batch_seq_length: int | None = (
        None  # tokens that rollouts are padded to at least; null: their longest
    )
    rewards: Mapping[str, RewardConfig] = field(
        default_factory=dict[str, RewardConfig]
    )  # by name; none: the served reward model alone

    @property
    def asks_critic(self) -> bool:
        """Whether values are estimated, and by a critic."""
        return self.advantage_estimator == "gae"

    @property
    def served_reward(self) -> str | None:
        """The name of the reward that a reward model in another job gives; None: none does."""
        if not self.rewards:
            return "reward_model"
        return next((name for name, reward in self.rewards.items() if reward.function is None), None)

    def check(self, block: str) -> None:
        """Refuse what would be no run; ``block`` is where these settings stand."""
        LoopConfig.check(self, block)
        CreditConfig.check(self, block)
        for name, value, least in (
            ("num_ppo_epochs", self.num_ppo_epochs, 1),
            ("critic_warmup_steps", self.critic_warmup_steps, 0),
        ):
            if value < least:
                raise UserError(
                    f"{block}.{name}={value} is less than {least}", cure=f"set {block}.{name}={least} or more"
                )
        if self.critic_warmup_steps and not self.asks_critic:
            raise UserError(
                f"{block}.critic_warmup_steps={self.critic_warmup_steps}, and "
                f"{block}.advantage_estimator={self.advantage_estimator} asks no critic",
                cure=f"set {block}.critic_warmup_steps=0, or {block}.advantage_estimator=gae",
            )
        served = [name for name, reward in self.rewards.items() if reward.function is None]
        if len(served) > 1:
            raise UserError(
                f"{block}.rewards.{served[0]} and {block}.rewards.{served[1]} have no function, and one reward model "
                "is served",
                cure=f"set {block}.rewards.{served[1]}.function=MODULE.NAME, or leave the block out",
            )


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The ``model.ppo.sampling_params`` block."""

    use_greedy: bool = False  # take the most likely token
    temperature: float = 1.0  # logits are divided by it
    top_k: int = 0  # only the k most likely tokens; 0: all
    top_p: float = 1.0  # only the most likely tokens that together have this probability; 0 or 1: all
    min_p: float = 0.0  # only tokens at least this likely as a share of the most likely one's; 0: all
    repetition_penalty: float = 1.0  # tokens that were written before become less likely; 1: never
    add_BOS: bool = False
    # Texts that end an answer, as the model's own end tokens do; escapes are understood.
    end_strings: tuple[str, ...] = ("<|endoftext|>", "<extra_id_1>")


@dataclass(frozen=True, kw_only=True)
class LengthConfig:
    """The ``model.ppo.length_params`` block."""

    max_length: int | None = None  # tokens of an answer; null: half of what the model takes
    min_length: int = 1  # no answer ends before it has this many tokens


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(PolicyConfig):
    """The ``model.ppo`` block."""

    num_rollout_samples: int = 512  # answers of one rollout over all ranks
    num_responses_per_prompt: int = 1  # of these, to each prompt
    rollout_micro_batch_size: int = (
        8  # answers that a rank writes at once, and rows of a request to the critic
    )
    forward_micro_batch_size: int | None = None  # rows of a forward pass for log-probs; null: as above
    num_val_samples: int | None = None  # answers of a validation; null: as num_rollout_samples
    val_rollout_micro_batch_size: int | None = (
        None  # answers that a rank writes at once in validation; null: as above
    )
    offload_adam_states: bool = True  # to CPU memory while answers are written and judged
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    length_params: LengthConfig = field(default_factory=LengthConfig)

    def check(self, block: str) -> None:
        """Refuse values without a meaning; ``block`` is the block's name."""
        PolicyConfig.check(self, block)
        for name, value in (
            ("num_rollout_samples", self.num_rollout_samples),
            ("num_responses_per_prompt", self.num_responses_per_prompt),
            ("rollout_micro_batch_size", self.rollout_micro_batch_size),
            ("forward_micro_batch_size", self.forward_micro_batch_size),
            ("num_val_samples", self.num_val_samples),
            ("val_rollout_micro_batch_size", self.val_rollout_micro_batch_size),
            ("length_params.max_length", self.length_params.max_length),
        ):
            if value is not None and value < 1:
                raise UserError(
                    f"{block}.{name}={value} is not 1 or more", cure=f"set {block}.{name}=1 or more"
                )
        size, each = self.num_rollout_samples, self.num_responses_per_prompt
        if size % each:
            raise UserError(
                f"{block}.num_rollout_samples={size} is not a multiple of {block}.num_responses_per_prompt={each}",
                cure=f"set {block}.num_rollout_samples={-(-size // each) * each}",
            )
        self.sampling(max_length=self.length_params.max_length or 1 << 30, seed=0).check(
            f"{block}.sampling_params"
        )

    @property
    def num_prompts(self) -> int:
        """Prompts of a rollout."""
        return self.num_rollout_samples // self.num_responses_per_prompt

    @property
    def scoring_rows(self) -> int:
        """Rows of a forward pass for log-probs."""
        return self.forward_micro_batch_size or self.rollout_micro_batch_size

    def sampling(self, *, max_length: int, seed: int) -> SamplingConfig:
        """How answers are drawn.

        Args:
            max_length: tokens of an answer, where ``length_params`` leaves it open.
            seed: of the draws.
        """
        params, lengths = self.sampling_params, self.length_params
        return SamplingConfig(
            use_greedy=params.use_greedy,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            end_strings=tuple(map(unescape, params.end_strings)),
            max_length=lengths.max_length or max_length,
            min_length=lengths.min_length,
            seed=seed,
        )
