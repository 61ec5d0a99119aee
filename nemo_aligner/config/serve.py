# SPDX-License-Identifier: Apache-2.0
"""The settings of serve_reward_model.py and serve_ppo_critic.py."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from nemo_aligner.config.base import BatchedModelConfig, ModelConfig, ModelJob, PretrainedJob, TrainerConfig
from nemo_aligner.errors import UserError
from nemo_aligner.objectives.config import ValueConfig
from nemo_aligner.paths import PathText
from nemo_aligner.serving.protocol import RequestLimits

__all__ = [
    "CriticConfig",
    "CriticJob",
    "InferenceConfig",
    "RewardServerJob",
    "ServedModelConfig",
]


@dataclass(frozen=True, kw_only=True)
class ServedRegressionConfig:
    """The ``model.regression`` block of a server; null leaves the reward model's own value."""

    num_attributes: int | None = None
    merge_attributes: bool | None = None
    attribute_weights: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class ServedStandardizationConfig:
    """The ``model.reward_standardization`` block of a server; null leaves the reward model's own value."""

    enable: bool | None = None
    mean: float | None = None
    std: float | None = None


@dataclass(frozen=True, kw_only=True)
class ServedDataConfig:
    """The ``model.data`` block of a server; null leaves the reward model's own value."""

    append_eod: bool | None = None
    add_bos: bool | None = None


@dataclass(frozen=True, kw_only=True)
class ServedModelConfig(ModelConfig):
    """What the ``model`` blocks of both servers share."""

    data: ServedDataConfig = field(default_factory=ServedDataConfig)
    forward_micro_batch_size: int | None = None
    reward_model_type: str | None = None
    regression: ServedRegressionConfig = field(default_factory=ServedRegressionConfig)
    reward_standardization: ServedStandardizationConfig = field(default_factory=ServedStandardizationConfig)
    use_avg_pool: bool | None = None
    force_head_dtype: str | None = None

    def over(self, saved: Mapping[str, Any]) -> dict[str, Any]:
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
class LimitedConfig:
    """What the blocks of both servers say of requests."""

    max_request_rows: int = RequestLimits.rows
    max_request_bytes: int = RequestLimits.bytes
    max_waiting_requests: int = RequestLimits.waiting
    request_timeout: float = RequestLimits.seconds

    @property
    def request_limits(self) -> RequestLimits:
        """For the server."""
        return RequestLimits(
            rows=self.max_request_rows,
            bytes=self.max_request_bytes,
            waiting=self.max_waiting_requests,
            seconds=self.request_timeout,
        )

    def check_limits(self, block: str) -> None:
        """Refuse limits under which no request could be answered."""
        for name in ("max_request_rows", "max_request_bytes", "max_waiting_requests"):
            if (value := getattr(self, name)) < 1:
                raise UserError(
                    f"{block}.{name}={value} is out of range", cure=f"set {block}.{name} to 1 or more"
                )
        if not self.request_timeout > 0:
            raise UserError(
                f"{block}.request_timeout={self.request_timeout} is out of range",
                cure=f"set {block}.request_timeout to more than 0 seconds",
            )


@dataclass(frozen=True, kw_only=True)
class InferenceConfig(LimitedConfig):
    """The ``inference`` block."""

    port: int = 5555
    ip: str | None = None
    model_name: str = "reward_model"
    inference_micro_batch_size: int | None = None
    max_queue_delay_microseconds: int = 2000
    strip_sequence_length_to_multiple: int | None = None

    def check(self, block: str) -> None:
        """Refuse what cannot be served."""
        self.check_limits(block)
        check_serving(
            block,
            port=self.port,
            rows=self.inference_micro_batch_size,
            delay=self.max_queue_delay_microseconds,
            multiple=self.strip_sequence_length_to_multiple,
        )


def check_serving(block: str, *, port: int, rows: int | None, delay: int, multiple: int | None) -> None:
    """Refuse a port, sizes or a delay that no server can have."""
    for name, value, wrong, range_ in (
        ("port", port, not 0 < port < 65536, "1 to 65535"),
        ("inference_micro_batch_size", rows, rows is not None and rows < 1, "1 or more"),
        ("max_queue_delay_microseconds", delay, delay < 0, "0 or more"),
        (
            "strip_sequence_length_to_multiple",
            multiple,
            multiple is not None and multiple < 1,
            "1 or more, or null",
        ),
    ):
        if wrong:
            raise UserError(f"{block}.{name}={value} is out of range", cure=f"set {block}.{name} to {range_}")


@dataclass(frozen=True, kw_only=True)
class RewardServerJob(ModelJob):
    """All settings of serve_reward_model.py."""

    model: ServedModelConfig = field(default_factory=ServedModelConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
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
        return self.inference.inference_micro_batch_size or self.model.forward_micro_batch_size or 4

    def check(self, world_size: int | None = None) -> None:
        """See ModelJob."""
        ModelJob.check(self, world_size)
        self.inference.check("inference")


@dataclass(frozen=True, kw_only=True)
class CriticConfig(LimitedConfig):
    """The ``trainer.ppo`` block of a critic."""

    block: ClassVar[str] = "trainer.ppo"
    port: int = 5556
    ip: str | None = None
    combine_rm_and_critic_server: bool = True
    inference_micro_batch_size: int | tuple[int, ...] | None = None
    max_queue_delay_microseconds: int = 2000
    strip_sequence_length_to_multiple: int | None = None
    max_steps: int = 10000
    gradient_clip_val: float = 1.0
    max_skipped_steps: int = 10
    actor_timeout: float | None = 7200.0

    def check(self, block: str) -> None:
        """Refuse what cannot be served or learned."""
        self.check_limits(block)
        check_serving(
            block,
            port=self.port,
            rows=self.rows,
            delay=self.max_queue_delay_microseconds,
            multiple=self.strip_sequence_length_to_multiple,
        )
        for name, value, wrong, range_ in (
            ("max_steps", self.max_steps, self.max_steps < 1, "1 or more"),
            ("gradient_clip_val", self.gradient_clip_val, self.gradient_clip_val < 0, "0 (never) or more"),
            ("max_skipped_steps", self.max_skipped_steps, self.max_skipped_steps < 1, "1 or more"),
            (
                "actor_timeout",
                self.actor_timeout,
                self.actor_timeout is not None and self.actor_timeout <= 0,
                "more than 0 seconds, or null",
            ),
        ):
            if wrong:
                raise UserError(
                    f"{block}.{name}={value} is out of range", cure=f"set {block}.{name} to {range_}"
                )

    @property
    def rows(self) -> int | None:
        """Of a forward pass on one data parallel rank; of several preferred sizes the largest."""
        sizes = self.inference_micro_batch_size
        return max(sizes) if isinstance(sizes, tuple) else sizes


@dataclass(frozen=True, kw_only=True)
class CriticTrainerConfig(TrainerConfig):
    """The ``trainer`` block of serve_ppo_critic.py."""

    ppo: CriticConfig = field(default_factory=CriticConfig)


@dataclass(frozen=True, kw_only=True)
class CriticModelConfig(ServedModelConfig, BatchedModelConfig, ValueConfig):
    """The ``model`` block of serve_ppo_critic.py."""

    output_sequence: bool = True
    offload_adam_states: bool = False


@dataclass(frozen=True, kw_only=True)
class CriticJob(PretrainedJob):
    """All settings of serve_ppo_critic.py."""

    model: CriticModelConfig = field(default_factory=CriticModelConfig)
    trainer: CriticTrainerConfig = field(default_factory=CriticTrainerConfig)
    name: str = "megatron_gpt_critic"

    @property
    def loop(self) -> CriticConfig:
        """See Job."""
        return self.trainer.ppo

    @property
    def files(self) -> Mapping[str, Sequence[str]]:
        """See Job."""
        return {}

    @property
    def rows(self) -> int:
        """Of a forward pass for values and rewards on one data parallel rank."""
        return self.trainer.ppo.rows or self.model.forward_micro_batch_size or self.model.micro_batch_size

    def check(self, world_size: int | None = None) -> None:
        """See Job."""
        PretrainedJob.check(self, world_size)
        ValueConfig.check(self.model, "model")
        if not self.model.output_sequence:
            raise UserError(
                "model.output_sequence=False, but a critic has a value for each token",
                cure="set model.output_sequence=True, or serve a reward model by serve_reward_model.py",
            )
