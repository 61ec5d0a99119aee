# SPDX-License-Identifier: Apache-2.0
"""The settings of train_reward_model.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from nemo_aligner.config.base import BatchedModelConfig, PretrainedJob, TrainerConfig
from nemo_aligner.data.config import PairDataConfig
from nemo_aligner.data.first_rows import check_pair_rows
from nemo_aligner.errors import UserError
from nemo_aligner.objectives.config import RegressionConfig
from nemo_aligner.run.schedule import SupervisedConfig

__all__ = ["RMConfig", "RMJob", "RMModelConfig", "RMTrainerConfig", "StandardizationConfig"]


@dataclass(frozen=True, kw_only=True)
class RMConfig(SupervisedConfig):
    """The ``trainer.rm`` block."""

    block: ClassVar[str] = "trainer.rm"
    train_random_sampler: bool = True  # a new order of pairs each epoch
    val_random_sampler: bool = False  # validation in random order


@dataclass(frozen=True, kw_only=True)
class RMTrainerConfig(TrainerConfig):
    """The ``trainer`` block of train_reward_model.py."""

    rm: RMConfig = field(default_factory=RMConfig)


@dataclass(frozen=True, kw_only=True)
class StandardizationConfig:
    """The ``model.reward_standardization`` block."""

    enable: bool = False  # serve (reward - mean) / std
    mean: float | None = None
    std: float | None = None


@dataclass(frozen=True, kw_only=True)
class RMModelConfig(BatchedModelConfig):
    """The ``model`` block of train_reward_model.py."""

    data: PairDataConfig
    reward_model_type: str = "binary_ranking"
    regression: RegressionConfig = field(default_factory=RegressionConfig)
    reward_standardization: StandardizationConfig = field(default_factory=StandardizationConfig)
    output_sequence: bool = False
    use_avg_pool: bool = False
    force_head_dtype: str = "float32"
    micro_batch_size: int = 2
    forward_micro_batch_size: int | None = None

    @property
    def own_keys(self) -> dict[str, Any]:
        """See ModelConfig."""
        regression = self.regression
        return {
            "share_embeddings_and_output_weights": False,
            "reward_model_type": self.reward_model_type,
            "regression": {
                "num_attributes": regression.num_attributes,
                "merge_attributes": regression.merge_attributes,
                "attribute_weights": regression.weights if regression.attribute_weights else None,
                "loss_mask_val": regression.loss_mask_val,
                "loss_func": regression.loss_func,
            },
            "output_sequence": self.output_sequence,
            "use_avg_pool": self.use_avg_pool,
            "force_head_dtype": self.force_head_dtype,
            "data": {"append_eod": self.data.append_eod, "add_bos": self.data.add_bos},
        }


@dataclass(frozen=True, kw_only=True)
class RMJob(PretrainedJob):
    """All settings of train_reward_model.py."""

    model: RMModelConfig
    trainer: RMTrainerConfig = field(default_factory=RMTrainerConfig)
    name: str = "megatron_gpt"

    @property
    def loop(self) -> SupervisedConfig:
        """See Job."""
        return self.trainer.rm

    @property
    def files(self) -> Mapping[str, Sequence[str]]:
        """See Job."""
        return {"model.data.data_prefix": self.model.data.splits.paths}

    def check_rows(self) -> None:
        """See Job."""
        splits = self.model.data.splits
        if self.model.reward_model_type == "binary_ranking":
            for path in (*splits.train.paths, *(splits.validation.paths if splits.validation else ())):
                check_pair_rows(path)

    @property
    def validates(self) -> bool:
        """See Job."""
        return self.model.data.splits.validation is not None

    def check(self, world_size: int | None = None) -> None:
        """See Job."""
        PretrainedJob.check(self, world_size)
        standard = self.model.reward_standardization
        if standard.enable and None in (standard.mean, standard.std) and not self.validates:
            raise UserError(
                "model.reward_standardization.enable=True takes mean and std of the validation data, and there is none",
                cure="set model.reward_standardization.mean and std, or name validation data",
            )
        self.model.regression.check()
