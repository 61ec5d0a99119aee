# SPDX-License-Identifier: Apache-2.0
"""Where a run writes: its folder, metrics.jsonl, TensorBoard and its log file. Rank 0 writes, the others know where."""

import json
import logging
import logging.handlers
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self

from nemo_aligner.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["CheckpointCallbackConfig", "Experiment", "ExperimentConfig", "WandbConfig", "keep_early_records"]

logger = logging.getLogger(__name__)

# What is logged before the run's folder is known; flushed by hand, once there is a log.txt.
_early = logging.handlers.MemoryHandler(1000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)


def keep_early_records() -> None:
    """Hold log records from here on until a run is opened: its log.txt then begins with them."""
    logging.getLogger().addHandler(_early)


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """``exp_manager.wandb_logger_kwargs``."""

    project: str | None = None  # project that the run is filed under
    name: str | None = None  # the run's name


@dataclass(frozen=True, kw_only=True)
class CheckpointCallbackConfig:
    """``exp_manager.checkpoint_callback_params``."""

    monitor: str = "val_loss"  # metric that ranks checkpoints
    save_top_k: int = 5  # how many of the best are kept
    mode: str = "min"  # whether less or more of the metric is better
    always_save_nemo: bool = False  # write a .nemo beside each checkpoint
    save_nemo_on_train_end: bool = True  # write checkpoints/<name>.nemo when training ends
    filename: str | None = None  # template of checkpoint names
    model_parallel_size: int | None = None  # ranks of one model replica
    save_best_model: bool = False  # write the best checkpoint as .nemo


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """The ``exp_manager`` block."""

    explicit_log_dir: str | None = None  # the run's folder
    exp_dir: str | None = None  # else the folder is <exp_dir>/<name>/<time>
    name: str = "default"  # names the run and its .nemo
    create_tensorboard_logger: bool = True  # write TensorBoard events
    create_wandb_logger: bool = False  # log to Weights & Biases
    wandb_logger_kwargs: WandbConfig = field(default_factory=WandbConfig)
    resume_if_exists: bool = True  # go on from the last checkpoint
    resume_ignore_no_checkpoint: bool = True  # start anew where there is none
    create_checkpoint_callback: bool = True  # save while training
    checkpoint_callback_params: CheckpointCallbackConfig = field(default_factory=CheckpointCallbackConfig)

    def folder(self) -> Path:
        """The run's folder; without ``explicit_log_dir`` a new one each second."""
        if self.explicit_log_dir:
            return Path(self.explicit_log_dir)
        return Path(self.exp_dir or "nemo_experiments") / self.name / time.strftime("%Y-%m-%d_%H-%M-%S")

    def nemo_path(self, folder: Path) -> Path:
        """Where the trained model goes, in the run's folder."""
        return folder / "checkpoints" / f"{self.name}.nemo"

    def check_folder(self) -> None:
        """Refuse a folder whose result this run would overwrite, or that it cannot write to.

        Raises:
            UserError: a trained model is there already, or the folder cannot be made or written.
        """
        folder = Path(self.explicit_log_dir or self.exp_dir or ".")
        key = "exp_manager.explicit_log_dir" if self.explicit_log_dir else "exp_manager.exp_dir"
        result = self.nemo_path(folder)
        if (
            self.explicit_log_dir
            and self.checkpoint_callback_params.save_nemo_on_train_end
            and result.exists()
        ):
            raise UserError(
                f"{result} exists: a run in {key}={folder} has ended, and its result is not overwritten",
                cure=f"set {key} to another folder, or move the file away",
            )
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise UserError(
                f"{key}={folder} cannot be written: {there} is not a folder that you may write to",
                cure=f"set {key} to a folder that you may write to",
            )


class Experiment:
    """An open run folder. ``log`` is a no-op on all ranks but the writing one.

    Args:
        folder: as :meth:`ExperimentConfig.folder` gives it, the same on every rank.
        writes: whether this rank writes.
    """

    def __init__(self, config: ExperimentConfig, folder: Path, *, writes: bool) -> None:
        self.config, self.folder, self.writes = config, folder, writes
        self._metrics: IO[str] | None = None
        self._tensorboard: SummaryWriter | None = None

    @property
    def nemo_path(self) -> Path:
        """Where the trained model goes."""
        return self.config.nemo_path(self.folder)

    def __enter__(self) -> Self:
        if self.writes:
            self.config.check_folder()
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"the run's folder {self.folder} cannot be made: {error.strerror}",
                    cure="set exp_manager.explicit_log_dir to a folder that you may write to",
                ) from error
            self._metrics = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
            if self.config.create_tensorboard_logger:
                # Imported here: it takes a second, and only one rank writes.
                from torch.utils.tensorboard import SummaryWriter

                self._tensorboard = SummaryWriter(self.folder / "tensorboard")
            handler = logging.FileHandler(self.folder / "log.txt", encoding="utf-8")
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            logging.getLogger().addHandler(handler)
            logging.getLogger().removeHandler(_early)
            _early.setTarget(handler)
            _early.flush()
            self._handler = handler
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._metrics is not None:
            self._metrics.close()
            logging.getLogger().removeHandler(self._handler)
            self._handler.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Add a line to metrics.jsonl, and a point to TensorBoard, for ``step`` steps done."""
        if self._metrics is None:
            return
        values = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
        self._metrics.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._metrics.flush()
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
