# SPDX-License-Identifier: Apache-2.0
"""The settings of train_gpt_sft.py, and of its kin whose data are texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from nemo_aligner.config.base import ModelConfig, TrainerConfig, TrainingJob
from nemo_aligner.data.config import SFTDataConfig
from nemo_aligner.data.first_rows import check_sft_rows
from nemo_aligner.errors import UserError
from nemo_aligner.paths import PathText
from nemo_aligner.run.schedule import SupervisedConfig


@dataclass(frozen=True, kw_only=True)
class SFTTrainerConfig(TrainerConfig):
    """The ``trainer`` block of train_gpt_sft.py."""

    sft: SupervisedConfig = field(default_factory=SupervisedConfig)  # the loop


@dataclass(frozen=True, kw_only=True)
class SFTModelConfig(ModelConfig):
    """The ``model`` block of train_gpt_sft.py."""

    # the model to start from: a .nemo, a checkpoint, a Hugging Face folder, a GGUF file or OWNER/NAME of the hub
    restore_from_path: PathText
    data: SFTDataConfig  # where samples come from
    # learn the response only; False: the prompt too; in conversations the speakers decide
    answer_only_loss: bool = True


@dataclass(frozen=True, kw_only=True)
class TextJob(TrainingJob):
    """All settings of a script whose data are texts."""

    model: SFTModelConfig

    @property
    def pretrained(self) -> tuple[str, str]:
        """See TrainingJob."""
        return "model.restore_from_path", self.model.restore_from_path

    @property
    def loop(self) -> SupervisedConfig:
        """See TrainingJob."""
        loop = super().loop
        assert isinstance(loop, SupervisedConfig)
        return loop

    @property
    def batches(self) -> dict[str, tuple[int, int]]:
        """See TrainingJob."""
        splits = {"train_ds": self.model.data.train_ds, **self.model.data.validation}
        return {
            f"model.data.{name}": (split.global_batch_size, split.micro_batch_size)
            for name, split in splits.items()
        }

    @property
    def files(self) -> Mapping[str, Sequence[str]]:
        """See TrainingJob."""
        splits = {"train_ds": self.model.data.train_ds, **self.model.data.validation}
        part = self.model.data.part
        return {f"model.data.{name}.file_path": part(split).paths for name, split in splits.items()}

    def check_rows(self) -> None:
        """See TrainingJob."""
        data = self.model.data
        for split in (data.train_ds, *data.validation.values()):
            for path in data.part(split).paths:
                check_sft_rows(data, replace(split, file_path=path))

    @property
    def validates(self) -> bool:
        """See TrainingJob."""
        return bool(self.model.data.validation)

    def check(self, world_size: int | None = None) -> None:
        """See TrainingJob."""
        TrainingJob.check(self, world_size)
        loop = self.loop
        if self.model.data.plain_text and loop.val_responses:
            raise UserError(
                f"{loop.block}.val_responses={loop.val_responses} needs prompts, and model.data.plain_text=True has "
                "none",
                fix=f"set {loop.block}.val_responses=0",
            )
        if not self.model.answer_only_loss and not self.model.data.chat and loop.val_responses:
            raise UserError(
                f"{loop.block}.val_responses={loop.val_responses} needs to know where responses begin, and with "
                "model.answer_only_loss=False all of a row is learned",
                fix=f"set {loop.block}.val_responses=0, or model.answer_only_loss=True",
            )


@dataclass(frozen=True, kw_only=True)
class SFTJob(TextJob):
    """All settings of train_gpt_sft.py."""

    trainer: SFTTrainerConfig = field(default_factory=SFTTrainerConfig)
    name: str = "megatron_gpt_sft"
