# SPDX-License-Identifier: Apache-2.0
"""The common settings of scripts whose data are pairs of responses, or single ones that are labeled or rated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemo_aligner.config.base import BatchedModelConfig, PretrainedJob
from nemo_aligner.data.config import PairDataConfig
from nemo_aligner.data.first_rows import check_pair_rows
from nemo_aligner.data.text_rows import ResponseFiles, open_pairs
from nemo_aligner.run.schedule import SupervisedConfig


@dataclass(frozen=True, kw_only=True)
class PairLoopConfig(SupervisedConfig):
    """The algorithm's block under ``trainer``."""

    # a new order of rows each epoch, a function of model.seed and the epoch alone
    train_random_sampler: bool = True
    val_random_sampler: bool = False  # True: validation in random order


@dataclass(frozen=True, kw_only=True)
class PairModelConfig(BatchedModelConfig):
    """The ``model`` block."""

    data: PairDataConfig  # where rows come from
    micro_batch_size: int = 2  # rows (pairs, or responses) of one forward and backward pass on one rank
    global_batch_size: int = 64  # rows (pairs, or responses) of one optimizer step over all ranks


@dataclass(frozen=True, kw_only=True)
class PairJob(PretrainedJob):
    """All settings of such a script."""

    model: PairModelConfig
    name: str = "megatron_gpt"

    @property
    def loop(self) -> PairLoopConfig:
        """See TrainingJob."""
        loop = super().loop
        assert isinstance(loop, PairLoopConfig)
        return loop

    @property
    def responses(self) -> ResponseFiles:
        """How the files are read; pairs unless a job has other rows."""
        return ResponseFiles(open=open_pairs, check_first=check_pair_rows, unit="pairs")

    @property
    def files(self) -> Mapping[str, Sequence[str]]:
        """See TrainingJob."""
        return {"model.data.data_prefix": self.model.data.splits.paths}

    def check_rows(self) -> None:
        """See TrainingJob."""
        splits, check = self.model.data.splits, self.responses.check_first
        for path in (*splits.train.paths, *(splits.validation.paths if splits.validation else ())):
            if check is not None:
                check(path)

    @property
    def validates(self) -> bool:
        """See TrainingJob."""
        return self.model.data.splits.validation is not None
