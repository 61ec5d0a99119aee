# SPDX-License-Identifier: Apache-2.0
"""The settings of generate.py and evaluate.py, which train nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_aligner.algorithms.ppo_config import RewardRemoteConfig
from nemo_aligner.bounds import bounded
from nemo_aligner.config.base import ModelConfig, ModelJob, TrainerConfig
from nemo_aligner.data.config import unescape
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.learning_rate import OptimConfig
from nemo_aligner.models.sampling_config import SamplingConfig
from nemo_aligner.paths import PathText

_NOT_ONE = ("{key}={value} is not {range}", "set {key}=1")


@dataclass(frozen=True, kw_only=True)
class GenerateModelConfig(ModelConfig):
    """The ``model`` block of generate.py."""

    # the model: a .nemo, a checkpoint, a Hugging Face folder, a GGUF file or OWNER/NAME of the hub
    restore_from_path: PathText


@dataclass(frozen=True, kw_only=True)
class GenerateJob(ModelJob):
    """All settings of generate.py."""

    model: GenerateModelConfig
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    # how tokens are drawn, and when a response ends
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    # JSONL of {"text"}, {"prompt"} or {"messages"}; null: a conversation at the terminal
    input_file: PathText | None = None
    # JSONL of prompt, answer, finished, logprob and num_tokens, and reward if asked, one line per response
    output_file: PathText | None = None
    overwrite: bool = False  # True: replace an output_file that exists
    num_samples: int = bounded(1, at_least=1, message=_NOT_ONE)  # responses to each prompt
    # a Python function, MODULE.NAME, whose reward of each response is written beside it, as in trainer.ppo.rewards
    reward_function: str | None = None
    # or a Python class, MODULE.NAME, that replies to each turn and rewards it; docs/environments.md
    reward_environment: str | None = None
    reward_max_turns: int | None = bounded(None, at_least=1)  # turns in it, at most; null: until it ends
    # further arguments of either, as in {ground_truth: expected_answer}
    reward_arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    reward_timeout: float = bounded(60.0, above=0)  # seconds of a call; then the reward is 0
    # or the served reward model that gives it, serve_reward_model.py; {} for its defaults
    reward_model: RewardRemoteConfig | None = None
    # of the responses to each prompt, so many of the highest rewards are written, the best first; null: all
    top_n: int | None = bounded(None, at_least=1)
    # responses that a data parallel rank generates at once; each takes its key/value cache's memory
    batch_size: int = bounded(64, at_least=1, message=_NOT_ONE)

    @property
    def sampling_config(self) -> SamplingConfig:
        """``sampling``, with the characters that escapes in its end strings stand for."""
        return replace(self.sampling, end_strings=tuple(map(unescape, self.sampling.end_strings)))

    @property
    def pretrained(self) -> tuple[str, str]:
        """See ModelJob."""
        return "model.restore_from_path", self.model.restore_from_path

    @property
    def files(self) -> Mapping[str, Sequence[str]]:
        """See ModelJob."""
        return {} if self.input_file is None else {"input_file": (self.input_file,)}

    def check(self, world_size: int | None = None) -> None:
        """See ModelJob."""
        ModelJob.check(self, world_size)
        self.sampling.check("sampling")
        if (self.input_file is None) != (self.output_file is None):
            given, missing = (
                ("input_file", "output_file") if self.input_file else ("output_file", "input_file")
            )
            raise UserError(
                f"{given} is set and {missing} is not", fix="set both, or neither for a conversation"
            )
        names = ("reward_function", "reward_environment", "reward_model")
        rewards = [name for name in names if getattr(self, name) is not None]
        if len(rewards) > 1:
            raise UserError(
                f"{' and '.join(rewards)} are both set, and a response has one reward",
                fix="set one of them to null",
            )
        if self.reward_arguments and rewards not in (["reward_function"], ["reward_environment"]):
            raise UserError(
                "reward_arguments are of a reward_function or a reward_environment, and there is none",
                fix="set reward_function=MODULE.NAME",
            )
        if self.reward_max_turns is not None and self.reward_environment is None:
            raise UserError(
                f"reward_max_turns={self.reward_max_turns} has no effect without reward_environment",
                fix="set reward_environment=MODULE.NAME, or leave it out",
            )
        if rewards and self.input_file is None:
            raise UserError(
                "a reward is asked for, and a conversation at the terminal has none", fix="set input_file"
            )
        if self.top_n is not None and not rewards:
            raise UserError(
                f"top_n={self.top_n} compares responses by their rewards, and there are none",
                fix="set reward_function, reward_environment or reward_model",
            )
        if self.top_n is not None and self.top_n > self.num_samples:
            raise UserError(
                f"top_n={self.top_n} is more than num_samples={self.num_samples}",
                fix="set num_samples to the responses that the best are taken from, for instance 16",
            )
        if self.model.optim != OptimConfig():
            raise UserError("model.optim is set, and nothing is trained", fix="remove it")

    def check_paths(self) -> None:
        """See ModelJob."""
        ModelJob.check_paths(self)
        if self.output_file and Path(self.output_file).exists() and not self.overwrite:
            raise UserError(
                f"output_file={self.output_file} exists",
                fix="name another, or set overwrite=True to replace it",
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateJob(GenerateJob):
    """All settings of evaluate.py."""

    right_from: float = 1.0  # a response of this reward or more is right
    # the K of pass@K, each at most num_samples; null: 1, 2, 4 and so on
    pass_at: tuple[int, ...] | None = bounded(None, at_least=1)

    @property
    def ks(self) -> Sequence[int]:
        """The K of pass@K."""
        powers = [2**i for i in range(self.num_samples.bit_length())]
        return powers if self.pass_at is None else self.pass_at

    @property
    def summary_file(self) -> Path:
        """Where the figures go: beside output_file."""
        assert self.output_file is not None
        return Path(self.output_file).with_suffix(".summary.json")

    def check(self, world_size: int | None = None) -> None:
        """See ModelJob."""
        if self.input_file is None or self.output_file is None:
            raise UserError(
                "an evaluation asks a file of prompts", fix="set input_file=PROMPTS.jsonl and output_file"
            )
        if not (self.reward_function or self.reward_environment or self.reward_model):
            raise UserError(
                "an evaluation needs to know which responses are right",
                fix="set reward_function, for instance to nemo_aligner.environments.rules.gsm8k",
            )
        if self.top_n is not None:
            raise UserError(f"top_n={self.top_n} leaves responses out that are counted", fix="set top_n=null")
        GenerateJob.check(self, world_size)
        if self.ks and max(self.ks) > self.num_samples:
            raise UserError(
                f"pass_at={max(self.ks)} is more than num_samples={self.num_samples}",
                fix=f"set num_samples to {max(self.ks)} or more",
            )

    def check_paths(self) -> None:
        """See ModelJob."""
        GenerateJob.check_paths(self)
        if self.summary_file.exists() and not self.overwrite:
            raise UserError(
                f"{self.summary_file} exists",
                fix="name another output_file, or set overwrite=True to replace it",
            )
