# SPDX-License-Identifier: Apache-2.0
"""The settings of serve_reward_model.py and serve_ppo_critic.py."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from nemo_aligner.bounds import bounded
from nemo_aligner.config.base import BatchedModelConfig, ModelConfig, ModelJob, PretrainedJob, TrainerConfig
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.learning_rate import OptimConfig
from nemo_aligner.objectives.config import ValueConfig
from nemo_aligner.paths import PathText
from nemo_aligner.run.experiment import CheckpointCallbackConfig, ExperimentConfig
from nemo_aligner.serving.protocol import RequestLimits

_ROWS = 4  # of a reward server's forward pass


@dataclass(frozen=True, kw_only=True)
class ServedRegressionConfig:
    """The ``model.regression`` block of a server; null leaves the reward model's own value."""

    num_attributes: int | None = None  # numbers that the head gives to a sequence
    merge_attributes: bool | None = None  # True: one reward, the attributes weighted by attribute_weights
    attribute_weights: tuple[float, ...] | None = None  # one number for each attribute


@dataclass(frozen=True, kw_only=True)
class ServedStandardizationConfig:
    """The ``model.reward_standardization`` block of a server; null leaves the reward model's own value."""

    enable: bool | None = None  # True: serve (reward - mean) / std
    mean: float | None = None  # of the rewards
    std: float | None = None  # of the rewards


@dataclass(frozen=True, kw_only=True)
class ServedDataConfig:
    """The ``model.data`` block of a server; null leaves the reward model's own value."""

    append_eod: bool | None = None  # True: end each with EOS, where its reward is then read
    add_bos: bool | None = None  # start each with BOS, never twice


@dataclass(frozen=True, kw_only=True)
class ServedModelConfig(ModelConfig):
    """The common keys of the ``model`` blocks of both servers."""

    # how sentences become tokens; null: as in the reward model's training, which its checkpoint remembers
    data: ServedDataConfig = field(default_factory=ServedDataConfig)
    # rows of a forward pass, where inference_micro_batch_size is not set
    forward_micro_batch_size: int | None = None
    reward_model_type: str | None = None  # binary_ranking or regression
    # of a reward model with several attributes
    regression: ServedRegressionConfig = field(default_factory=ServedRegressionConfig)
    # rewards are (reward - mean) / std, and a critic's values start on that scale
    reward_standardization: ServedStandardizationConfig = field(default_factory=ServedStandardizationConfig)
    # the reward is read from the mean of the hidden states, not from the last one
    use_avg_pool: bool | None = None
    force_head_dtype: str | None = None  # of the head's product: float32, bfloat16 or float16

    def override(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """The reward model's model_config.yaml with what the settings say of its head."""
        merged = dict(saved)
        for name in ("reward_model_type", "use_avg_pool", "force_head_dtype"):
            if (value := getattr(self, name)) is not None:
                merged[name] = value
        for name in ("regression", "reward_standardization", "data"):
            given = {key: value for key, value in asdict(getattr(self, name)).items() if value is not None}
            merged[name] = {**(saved.get(name) or {}), **given}
        return merged


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """The common keys of the blocks of both servers."""

    # where it listens; the actor's remote_critic_rm names it, too
    port: int = bounded(5555, at_least=1, at_most=65535)
    # address to listen on; null: 127.0.0.1, or the node's under a Slurm job of several nodes
    ip: str | None = None
    # rows of a forward pass on one data parallel rank
    inference_micro_batch_size: int | tuple[int, ...] | None = bounded(None, at_least=1)
    # how long a request without a version waits for others to be computed with
    max_queue_delay_microseconds: int = bounded(2000, at_least=0)
    # cut padding to the longest row, rounded up to this; null: keep it
    strip_sequence_length_to_multiple: int | None = bounded(None, at_least=1, to="1 or more, or null")
    max_request_rows: int = bounded(RequestLimits.rows, at_least=1)  # a request with more is refused
    max_request_bytes: int = bounded(RequestLimits.bytes, at_least=1)  # as above, unpacked
    # so many without a reply; the next gets a refusal, to ask again later
    max_waiting_requests: int = bounded(RequestLimits.waiting, at_least=1)
    # seconds after which a request is given up
    request_timeout: float = bounded(RequestLimits.seconds, above=0, to="more than 0 seconds")

    @property
    def rows(self) -> int | None:
        """Of a forward pass on one data parallel rank; of several preferred sizes the largest."""
        sizes = self.inference_micro_batch_size
        return max(sizes) if isinstance(sizes, tuple) else sizes

    @property
    def request_limits(self) -> RequestLimits:
        """For the server."""
        return RequestLimits(
            rows=self.max_request_rows,
            bytes=self.max_request_bytes,
            waiting=self.max_waiting_requests,
            seconds=self.request_timeout,
        )


@dataclass(frozen=True, kw_only=True)
class InferenceConfig(ServingConfig):
    """The ``inference`` block."""

    inference_micro_batch_size: int | None = None
    model_name: str = "reward_model"  # the endpoint's name


@dataclass(frozen=True, kw_only=True)
class RewardServerJob(ModelJob):
    """All settings of serve_reward_model.py."""

    model: ServedModelConfig = field(
        default_factory=partial(ServedModelConfig, forward_micro_batch_size=_ROWS)
    )
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)  # the server
    # the reward model: a .nemo, a checkpoint, a Hugging Face folder, a GGUF file or OWNER/NAME of the hub
    rm_model_file: PathText

    @property
    def pretrained(self) -> tuple[str, str]:
        """See ModelJob."""
        return "rm_model_file", self.rm_model_file

    @property
    def files(self) -> Mapping[str, Sequence[str]]:
        """See ModelJob."""
        return {}

    @property
    def rows(self) -> int:
        """Of a forward pass on one data parallel rank."""
        return self.inference.rows or self.model.forward_micro_batch_size or _ROWS


@dataclass(frozen=True, kw_only=True)
class CriticConfig(ServingConfig):
    """The ``trainer.ppo`` block of a critic."""

    port: int = 5556
    combine_rm_and_critic_server: bool = True  # serve the reward model too, from pretrained_checkpoint
    # optimizer steps that the learning rate's schedule is made for
    max_steps: int = bounded(10000, at_least=1)
    # the gradient's norm is cut to this; 0: never
    gradient_clip_val: float = bounded(1.0, at_least=0, to="0 (never) or more")
    # steps in a row whose loss or gradient is not finite, after which the run ends
    max_skipped_steps: int = bounded(10, at_least=1)
    # seconds without a word from the actor after which this job saves and ends; null: never
    actor_timeout: float | None = bounded(7200.0, above=0, to="more than 0 seconds, or null")


@dataclass(frozen=True, kw_only=True)
class CriticTrainerConfig(TrainerConfig):
    """The ``trainer`` block of serve_ppo_critic.py."""

    ppo: CriticConfig = field(default_factory=CriticConfig)  # the server and its learning


@dataclass(frozen=True, kw_only=True)
class CriticModelConfig(ServedModelConfig, BatchedModelConfig, ValueConfig):
    """The ``model`` block of serve_ppo_critic.py."""

    optim: OptimConfig = field(default_factory=partial(OptimConfig, lr=9e-6, weight_decay=0.1))
    # PPO learns from one reward: the attributes weighted by attribute_weights
    regression: ServedRegressionConfig = field(
        default_factory=partial(ServedRegressionConfig, merge_attributes=True)
    )
    output_sequence: bool = True  # only True: a value for each token
    # keep the optimizer's moments in CPU memory while responses are scored
    offload_adam_states: bool = False


@dataclass(frozen=True, kw_only=True)
class CriticJob(PretrainedJob):
    """All settings of serve_ppo_critic.py."""

    model: CriticModelConfig = field(default_factory=CriticModelConfig)
    trainer: CriticTrainerConfig = field(default_factory=CriticTrainerConfig)
    # it saves when the actor asks, and keeps the newest two beside the best
    exp_manager: ExperimentConfig = field(
        default_factory=partial(
            ExperimentConfig,
            checkpoint_callback_params=CheckpointCallbackConfig(
                monitor="step", save_top_k=0, mode="max", filename="megatron_gpt-{step}"
            ),
        )
    )
    name: str = "megatron_gpt_critic"

    @property
    def files(self) -> Mapping[str, Sequence[str]]:
        """See TrainingJob."""
        return {}

    @property
    def rows(self) -> int:
        """Of a forward pass for values and rewards on one data parallel rank."""
        return self.trainer.ppo.rows or self.model.forward_micro_batch_size or self.model.micro_batch_size

    def check(self, world_size: int | None = None) -> None:
        """See TrainingJob."""
        PretrainedJob.check(self, world_size)
        if not self.model.output_sequence:
            raise UserError(
                "model.output_sequence=False, but a critic has a value for each token",
                fix="set model.output_sequence=True, or serve a reward model by serve_reward_model.py",
            )
