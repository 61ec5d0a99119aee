# SPDX-License-Identifier: Apache-2.0
"""The settings of PPO's loop and of its rollouts. Imports no torch, so that they are checked before it is loaded."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from nemo_aligner.bounds import bounded, check_bounds
from nemo_aligner.data.config import unescape
from nemo_aligner.environments.evaluation import PATTERN
from nemo_aligner.errors import UserError
from nemo_aligner.models.sampling_config import DrawConfig, SamplingConfig
from nemo_aligner.objectives.config import CreditConfig, PolicyConfig
from nemo_aligner.paths import PathText
from nemo_aligner.run.schedule import LoopConfig

_TOO_FEW = ("{key}={value} is less than {range}", "set {key}={range} or more")
NO_TIME = ("{key}={value}: must be > 0 seconds", "set {key} above 0 seconds")
_NOT_ONE = ("{key}={value} is not {range}", "set {key}={range}")


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """The ``judge`` block of a reward: the policy scores responses itself."""

    # a text file that asks for a score, with {prompt} and {response} in it; null: points from 0 to 5 for being of help
    template: PathText | None = None
    pattern: str = PATTERN  # a regular expression, whose group is the score
    # texts that are sampled of a response; the reward is their mean score
    evaluations: int = bounded(3, at_least=1)
    max_length: int = bounded(256, at_least=1)  # tokens of an evaluation, at most
    temperature: float = bounded(0.7, above=0)  # of evaluations
    low: float = 0.0  # the lowest score, and the reward where no evaluation has one
    high: float = 5.0  # the highest; a number outside is none

    def check(self, block: str) -> None:
        """Raise UserError for values without a valid judge; ``block`` is their section."""
        check_bounds(self, block)
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise UserError(
                f"{block}.pattern={self.pattern!r} is no regular expression: {error}",
                fix="correct the expression",
            ) from error
        if groups != 1:
            raise UserError(
                f"{block}.pattern={self.pattern!r} has {groups} groups, and one is the score",
                fix="put parentheses around the score alone, and (?:...) around what else is grouped",
            )
        if self.low >= self.high:
            raise UserError(
                f"{block}.low={self.low} is not below {block}.high={self.high}",
                fix=f"set {block}.high above {block}.low",
            )


@dataclass(frozen=True, kw_only=True)
class RewardRemoteConfig:
    """The address of a serve_reward_model.py."""

    name: str = "reward_model"  # the endpoint's name
    ip: str = "localhost"  # its host
    port: int = 5555  # its port
    stop_at_end: bool = False  # ask it to end when this run is finished


@dataclass(frozen=True, kw_only=True)
class TimesConfig:
    """How long servers are waited for."""

    # seconds to wait for a server to come up
    start_timeout: float = bounded(6000.0, above=0, message=NO_TIME)
    # seconds to wait for one that was lost; then this job saves and ends
    return_timeout: float = bounded(600.0, above=0, message=NO_TIME)
    reply_timeout: float = bounded(3600.0, above=0, message=NO_TIME)  # seconds to wait for a reply


@dataclass(frozen=True, kw_only=True)
class RewardServerConfig(RewardRemoteConfig, TimesConfig):
    """The ``server`` block of a reward."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """A block of ``trainer.ppo.rewards``."""

    function: str | None = None  # a Python function, MODULE.NAME; null: the judge, or the served reward model
    # a Python class, MODULE.NAME, that replies to each turn of the policy and rewards it; docs/environments.md
    environment: str | None = None
    # turns of the policy in an environment, at most; null: until it ends, or a limit of length cuts the response
    max_turns: int | None = bounded(None, at_least=1)
    # further arguments of the function or the class, as in {ground_truth: expected_answer}
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    # seconds of a call, then its process is killed
    timeout: float = bounded(60.0, above=0)
    # memory of each process, in which more is refused; null: as much as there is
    memory_gb: float | None = bounded(8.0, above=0)
    lost_reward: float = 0.0  # of a response whose process was killed or crashed
    # processes, on each rank that calls; null: of a function by the machine's cores, of an environment one for each
    # response that is generated at once
    workers: int | None = bounded(None, at_least=1)
    # the prompts whose responses it is of, by fields of their rows, as in {source: gsm8k}; {}: all
    rows: dict[str, Any] = field(default_factory=dict[str, Any])
    # a serve_reward_model.py of its own, beside that of remote_critic_rm
    server: RewardServerConfig | None = None
    judge: JudgeConfig | None = None  # the policy itself; {} for its defaults
    # the length alone: over the last so many tokens up to length_params.max_length the reward falls from 0 to -1; a
    # float is a share of max_length
    overlong_buffer: int | float | None = bounded(None, above=0)
    clip: float | None = bounded(None, above=0)  # it is held within -+ this; null: it is not
    # to mean 0 and variance 1 over the responses to a batch of prompts, after clip and before weight; in validation not
    normalize: bool = False
    weight: float = 1.0  # in the sum that responses are credited by; 0: the reward is only reported

    @property
    def is_served(self) -> bool:
        """True for the reward of the reward model of ``remote_critic_rm``."""
        return not self.sources

    def check(self, block: str) -> None:
        """Raise UserError for values without a valid reward; ``block`` is their section."""
        check_bounds(self, block)
        if self.judge is not None:
            self.judge.check(f"{block}.judge")
        if self.server is not None:
            check_bounds(self.server, f"{block}.server")
        if len(self.sources) > 1:
            raise UserError(
                f"{block} has a {' and a '.join(self.sources)}", fix="give each a name of its own"
            )
        usual = RewardConfig()
        for name in ("arguments", "timeout", "memory_gb", "lost_reward", "workers"):
            value = getattr(self, name)
            if value != getattr(usual, name) and self.called is None:
                raise UserError(
                    f"{block}.{name}={value} has no effect without {block}.function or {block}.environment",
                    fix=f"set one of them to MODULE.NAME, or leave {name} out",
                )
        if self.max_turns is not None and self.environment is None:
            raise UserError(
                f"{block}.max_turns={self.max_turns} has no effect without {block}.environment",
                fix=f"set {block}.environment=MODULE.NAME, or leave max_turns out",
            )

    @property
    def called(self) -> tuple[str, str] | None:
        """(setting, MODULE.NAME) of the code that is called in processes; None: nothing is."""
        names = ("function", "environment")
        return next(((name, value) for name in names if (value := getattr(self, name)) is not None), None)

    def applies_to(self, row: Mapping[str, object]) -> bool:
        """True if responses to a prompt of this row have the reward."""
        return all(key in row and row[key] == value for key, value in self.rows.items())

    @property
    def sources(self) -> list[str]:
        """The settings that say where the reward comes from, if it is not served."""
        names = ("function", "environment", "server", "judge", "overlong_buffer")
        return [name for name in names if getattr(self, name) is not None]


@dataclass(frozen=True, kw_only=True)
class PPOConfig(CreditConfig, LoopConfig):
    """The ``trainer.ppo`` block of an actor."""

    block: ClassVar[str] = "trainer.ppo"
    val_check_interval: int | float = 10
    # validate before the first step too: later validations then say how often they beat it, val_rollouts/win_rate
    val_before_train: bool = False
    save_interval: int | float = 10  # steps between checkpoints of both jobs; 0: at the end only
    # batches of prompts that a step may take until all groups of responses have unequal rewards; 1: a group of equal
    # rewards stays, and nothing is learned of it
    max_sampling_rounds: int = bounded(1, at_least=1, to="1", message=_TOO_FEW)
    num_ppo_epochs: int = bounded(1, at_least=1, to="1", message=_TOO_FEW)  # passes over each rollout
    # rollouts that only the critic learns from, before the first step
    critic_warmup_steps: int = bounded(0, at_least=0, to="0", message=_TOO_FEW)
    # tokens that rollouts are padded to at least; null: their longest
    rollout_batch_seq_length: int | None = None
    # with environments, go on with a response as soon as its reply is there; False: once all turns that have ended have
    # theirs, so that a run repeats bit for bit
    async_turns: bool = False
    table_rows: int = bounded(4, at_least=0)  # responses of each rollout in table_*_rollouts.jsonl
    # NAME: {function: MODULE.NAME, weight: 1.0}; with {} that of the reward model of remote_critic_rm
    rewards: Mapping[str, RewardConfig] = field(default_factory=dict[str, RewardConfig])

    @property
    def served_reward(self) -> str | None:
        """The name of the reward that a reward model in another job gives; None: none does."""
        if not self.rewards:
            return "reward_model" if self.needs_rewards else None
        return next((name for name, reward in self.rewards.items() if reward.is_served), None)

    def check(self, block: str) -> None:
        """Raise UserError for settings without a valid run; ``block`` is their section."""
        LoopConfig.check(self, block)
        CreditConfig.check(self, block)
        if self.critic_warmup_steps and not self.asks_critic:
            raise UserError(
                f"{block}.critic_warmup_steps={self.critic_warmup_steps}, and "
                f"{block}.advantage_estimator={self.advantage_estimator} asks no critic",
                fix=f"set {block}.critic_warmup_steps=0, or {block}.advantage_estimator=gae",
            )
        for name, reward in self.rewards.items():
            reward.check(f"{block}.rewards.{name}")
            for metric in (f"{name}_lost", f"{name}_turns"):
                if metric in self.rewards and reward.called is not None:
                    raise UserError(
                        f"{block}.rewards.{metric} has the name of a metric of {block}.rewards.{name}",
                        fix=f"give {metric} another name",
                    )
        served = [name for name, reward in self.rewards.items() if reward.is_served]
        if len(served) > 1:
            raise UserError(
                f"{block}.rewards.{served[0]} and {block}.rewards.{served[1]} are both of remote_critic_rm's one "
                "reward model",
                fix=f'set "{block}.rewards.{served[1]}.server={{ip: HOST, port: PORT}}" of another '
                f"serve_reward_model.py, or {block}.rewards.{served[1]}.function=MODULE.NAME, or leave the block out",
            )


@dataclass(frozen=True, kw_only=True)
class SamplingParams(DrawConfig):
    """The ``sampling_params`` block of an algorithm that generates."""

    add_BOS: bool = False  # start prompts with BOS; False: as model.data.add_bos says
    # texts that end a response, as the model's own end tokens do; escapes are understood
    end_strings: tuple[str, ...] = ("<|endoftext|>", "<extra_id_1>")


@dataclass(frozen=True, kw_only=True)
class LengthConfig:
    """The ``length_params`` block of an algorithm that generates."""

    # tokens of a response, at most; null: half of what the model takes
    max_length: int | None = bounded(None, at_least=1, message=_NOT_ONE)
    min_length: int = 1  # tokens of a response before its end token, at least


@dataclass(frozen=True, kw_only=True)
class ResponseConfig:
    """How responses are drawn, and when they end."""

    # how tokens are drawn; the trainer's log-probs are of the same distribution
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    length_params: LengthConfig = field(default_factory=LengthConfig)  # when a response ends

    def sampling(self, *, max_length: int, seed: int) -> SamplingConfig:
        """The sampling settings of responses.

        Args:
            max_length: tokens of a response, where ``length_params`` leaves it open.
            seed: of the draws.
        """
        drawn, lengths = asdict(self.sampling_params), self.length_params
        del drawn["add_BOS"]
        drawn["end_strings"] = tuple(map(unescape, self.sampling_params.end_strings))
        return SamplingConfig(
            **drawn, max_length=lengths.max_length or max_length, min_length=lengths.min_length, seed=seed
        )


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(ResponseConfig, PolicyConfig):
    """The ``model.ppo`` block."""

    # responses of one rollout over all ranks
    num_rollout_samples: int = bounded(512, at_least=1, message=_NOT_ONE)
    num_responses_per_prompt: int = bounded(1, at_least=1, message=_NOT_ONE)  # of these, to each prompt
    # responses that a rank generates at once, and rows of a request to the critic
    rollout_micro_batch_size: int = bounded(8, at_least=1, message=_NOT_ONE)
    # rows of a forward pass for log-probs; null: as rollout_micro_batch_size
    forward_micro_batch_size: int | None = bounded(None, at_least=1, message=_NOT_ONE)
    # responses of a validation, at most as many as there are prompts; null: as num_rollout_samples
    num_val_samples: int | None = bounded(None, at_least=1, message=_NOT_ONE)
    # responses that a rank generates at once in validation; null: as rollout_micro_batch_size
    val_rollout_micro_batch_size: int | None = bounded(None, at_least=1, message=_NOT_ONE)
    # keep the optimizer's moments in CPU memory while responses are generated
    offload_adam_states: bool = True

    def check(self, block: str) -> None:
        """Raise UserError for values out of range; ``block`` is their section."""
        size, each = self.num_rollout_samples, self.num_responses_per_prompt
        if size % each:
            raise UserError(
                f"{block}.num_rollout_samples={size} is not a multiple of {block}.num_responses_per_prompt={each}",
                fix=f"set {block}.num_rollout_samples={-(-size // each) * each}",
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
