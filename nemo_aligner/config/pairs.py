# SPDX-License-Identifier: Apache-2.0
"""The common settings of scripts whose data are pairs of responses, or single ones that are labeled or rated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemo_aligner.bounds import bounded
from nemo_aligner.config.base import BatchedModelConfig, PretrainedJob
from nemo_aligner.data.config import PairDataConfig
from nemo_aligner.data.first_rows import check_pair_rows
from nemo_aligner.data.text_rows import ResponseFiles, open_pairs
from nemo_aligner.errors import UserError
from nemo_aligner.run.schedule import SupervisedConfig


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The part of an algorithm's ``model`` block that says how its reference is asked."""

    # compute the reference's log-probs once and keep them in the run's folder; False: swap its weights in at each step
    store_reference: bool = False
    # pairs of a forward pass of the reference; null: model.micro_batch_size
    log_prob_forward_micro_batch_size: int | None = bounded(None, at_least=1)
    # steps after which the model becomes its own reference (TR-DPO); null: the reference stays
    renew_reference_every: int | None = bounded(None, at_least=1)

    def check_reference(self, block: str) -> None:
        """Raise UserError for settings that contradict each other; ``block`` is their section."""
        if self.store_reference and self.renew_reference_every is not None:
            raise UserError(
                f"{block}.renew_reference_every={self.renew_reference_every} changes the reference, and "
                f"{block}.store_reference=True asks it once",
                fix=f"set {block}.store_reference=False",
            )


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
