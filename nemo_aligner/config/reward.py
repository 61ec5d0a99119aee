# SPDX-License-Identifier: Apache-2.0
"""The settings of train_reward_model.py."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from nemo_aligner.bounds import only
from nemo_aligner.config.base import TrainerConfig
from nemo_aligner.config.pairs import PairJob, PairLoopConfig, PairModelConfig
from nemo_aligner.data.text_rows import Labels, ResponseFiles, open_labeled
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.learning_rate import OptimConfig
from nemo_aligner.objectives.config import RegressionConfig
from nemo_aligner.run.experiment import CheckpointCallbackConfig, ExperimentConfig


@dataclass(frozen=True, kw_only=True)
class RMConfig(PairLoopConfig):
    """The ``trainer.rm`` block."""

    block: ClassVar[str] = "trainer.rm"
    val_responses: int = only(0, what="a text by a reward model")  # only 0


@dataclass(frozen=True, kw_only=True)
class RMTrainerConfig(TrainerConfig):
    """The ``trainer`` block of train_reward_model.py."""

    rm: RMConfig = field(default_factory=RMConfig)  # the loop


@dataclass(frozen=True, kw_only=True)
class StandardizationConfig:
    """The ``model.reward_standardization`` block."""

    enable: bool = False  # True: the saved model does
    mean: float | None = None  # null: of the last pass over the validation data
    std: float | None = None  # null: of the last pass over the validation data


@dataclass(frozen=True, kw_only=True)
class RMModelConfig(PairModelConfig):
    """The ``model`` block of train_reward_model.py."""

    optim: OptimConfig = field(default_factory=partial(OptimConfig, lr=9e-6, weight_decay=0.1))
    # binary_ranking: pairs of responses; regression: labeled attributes
    reward_model_type: str = "binary_ranking"
    regression: RegressionConfig = field(default_factory=RegressionConfig)  # of reward_model_type regression
    # rewards are served as (reward - mean) / std
    reward_standardization: StandardizationConfig = field(default_factory=StandardizationConfig)
    # True: a critic, with a value for each token; the reward model's server wants False
    output_sequence: bool = False
    use_avg_pool: bool = False  # read the reward from the mean of the hidden states, not from the last one
    force_head_dtype: str = "float32"  # of the head's product: float32, bfloat16 or float16
    forward_micro_batch_size: int | None = None

    @property
    def saved_keys(self) -> dict[str, Any]:
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
class RMJob(PairJob):
    """All settings of train_reward_model.py."""

    model: RMModelConfig
    trainer: RMTrainerConfig = field(default_factory=RMTrainerConfig)
    exp_manager: ExperimentConfig = field(
        default_factory=partial(
            ExperimentConfig, checkpoint_callback_params=CheckpointCallbackConfig(save_top_k=3)
        )
    )

    @property
    def responses(self) -> ResponseFiles:
        """See PairJob."""
        if self.model.reward_model_type != "regression":
            return super().responses
        regression = self.model.regression
        paired = regression.loss_func != "regression"
        labels = Labels(
            num_attributes=regression.num_attributes, missing=regression.loss_mask_val, paired=paired
        )
        return ResponseFiles(open=partial(open_labeled, labels=labels), unit="pairs" if paired else "rows")

    def check(self, world_size: int | None = None) -> None:
        """See TrainingJob."""
        PairJob.check(self, world_size)
        standard = self.model.reward_standardization
        if standard.enable and None in (standard.mean, standard.std) and not self.validates:
            raise UserError(
                "model.reward_standardization.enable=True takes mean and std of the validation data, and there is none",
                fix="set model.reward_standardization.mean and std, or name validation data",
            )
        self.model.regression.check()
