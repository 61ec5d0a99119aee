# SPDX-License-Identifier: Apache-2.0
"""Where a run writes: its folder, metrics.jsonl, TensorBoard and its log file. Rank 0 writes, the others know where."""

import contextlib
import importlib.util
import logging
import logging.handlers
import math
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from nemo_aligner.errors import UserError
from nemo_aligner.paths import PathText
from nemo_aligner.run.disk import report_if_full
from nemo_aligner.run.identity import RunIdentity
from nemo_aligner.run.lock import FolderLock
from nemo_aligner.run.records import append, record, rewind
from nemo_aligner.run.status import STATUS, RunStatus
from nemo_aligner.run.stop import seconds_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from wandb import Run as WandbRun

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
# In every finished checkpoint's folder: where the run stood.
TRAINER_STATE = "trainer_state.json"

# What is logged before the run's folder is known; flushed by hand, once there is a log.txt.
_early = logging.handlers.MemoryHandler(1000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)


def keep_early_records() -> None:
    """Hold log records from here on until a run is opened: its log.txt then begins with them."""
    logging.getLogger().addHandler(_early)


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """``exp_manager.wandb_logger_kwargs``; a name that is empty, as an undefined shell variable makes it, is none."""

    project: str | None = None  # project that the run is filed under; null: exp_manager.name
    name: str | None = None  # the run's name; null: exp_manager.name


@dataclass(frozen=True, kw_only=True)
class CheckpointCallbackConfig:
    """``exp_manager.checkpoint_callback_params``."""

    monitor: str = "val_loss"  # metric that ranks checkpoints; validation_loss means the same
    save_top_k: int = 5  # how many of the best are kept, beside the newest; -1: all
    mode: Literal["min", "max"] = "min"  # whether less (min) or more (max) of the metric is better
    always_save_nemo: bool = False  # write a .nemo beside each checkpoint
    save_nemo_on_train_end: bool = True  # write checkpoints/<name>.nemo when training ends
    filename: str = "model--{val_loss:.3f}-{step}-{consumed_samples}-{epoch}"  # template of checkpoint names
    # checkpoints/<name>.nemo is the best checkpoint by the monitor, not the last
    save_best_model: bool = False
    # write while training goes on; needs memory for a copy of the weights and the optimizer
    async_save: bool = False

    @property
    def writes_result(self) -> bool:
        """True if the run ends with checkpoints/<name>.nemo."""
        return self.save_nemo_on_train_end or self.save_best_model


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """The ``exp_manager`` block."""

    explicit_log_dir: PathText | None = None  # folder of the run; null: <exp_dir>/<name>/<time>
    exp_dir: PathText | None = None  # null: ./nemo_experiments
    name: str = "default"  # names the run and the .nemo it writes
    max_time_per_run: str | None = None  # days:hours:minutes:seconds; save and end before they are over
    create_tensorboard_logger: bool = True  # write TensorBoard events beside metrics.jsonl
    create_wandb_logger: bool = False  # log to Weights & Biases
    wandb_logger_kwargs: WandbConfig = field(default_factory=WandbConfig)  # given to wandb
    resume_if_exists: bool = True  # go on from the newest checkpoint in the folder
    resume_ignore_no_checkpoint: bool = True  # start anew where there is none; False: refuse
    resume_from_checkpoint: PathText | None = None  # checkpoint to go on from where the folder has none
    # True: set a damaged newest checkpoint aside, and go on from an older whole one
    resume_from_older_if_damaged: bool = False
    # True: go on although settings, model or data are others, with other numbers
    resume_with_changes: bool = False
    create_checkpoint_callback: bool = True  # save checkpoints while training
    # which checkpoints are written and kept
    checkpoint_callback_params: CheckpointCallbackConfig = field(default_factory=CheckpointCallbackConfig)

    def folder(self) -> Path:
        """The run's folder; without ``explicit_log_dir`` a new one."""
        if self.explicit_log_dir:
            return Path(self.explicit_log_dir)
        now = time.strftime("%Y-%m-%d_%H-%M-%S")
        names = (now, *(f"{now}_{number}" for number in range(2, 100)))
        folders = [Path(self.exp_dir or "nemo_experiments") / self.name / name for name in names]
        return next(folder for folder in folders if not folder.exists())

    @property
    def folder_setting(self) -> str:
        """The key that names the run's folder."""
        return "exp_manager.explicit_log_dir" if self.explicit_log_dir else "exp_manager.exp_dir"

    def make_folder(self, folder: Path) -> None:
        """Make the run's folder where it is not there.

        Raises:
            UserError: it cannot be made.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the run's folder {folder} cannot be made: {error.strerror}",
                fix="set exp_manager.explicit_log_dir to a folder that you may write to",
            ) from error

    def nemo_path(self, folder: Path) -> Path:
        """Where the trained model goes, in the run's folder."""
        return self.checkpoints_folder(folder) / f"{self.name}.nemo"

    def adapters_path(self, folder: Path) -> Path:
        """Where the adapters that were trained go, as PEFT reads them, in the run's folder."""
        return self.checkpoints_folder(folder) / f"{self.name}_peft"

    def checkpoints_folder(self, folder: Path) -> Path:
        """Where checkpoints go, in the run's folder."""
        return folder / "checkpoints"

    @property
    def max_seconds(self) -> float | None:
        """``max_time_per_run`` in seconds.

        Raises:
            UserError: it is no duration.
        """
        return seconds_of(self.max_time_per_run, "exp_manager.max_time_per_run")

    def check(self) -> None:
        """Raise UserError for settings of logging or of the end that cannot work."""
        assert self.max_seconds is None or self.max_seconds >= 0
        if self.create_wandb_logger and importlib.util.find_spec("wandb") is None:
            raise UserError(
                "exp_manager.create_wandb_logger=True, but wandb is not installed",
                fix="pip install 'nemo-aligner[wandb]', or set exp_manager.create_wandb_logger=False",
            )

    def check_folder(self) -> None:
        """Raise UserError if this run would overwrite the results of the folder, or cannot write to it.

        Raises:
            UserError: an earlier run's results are there and not gone on from, or the folder cannot be written.
        """
        folder, key = Path(self.explicit_log_dir or self.exp_dir or "."), self.folder_setting
        if self.explicit_log_dir:
            FolderLock(folder, setting=key).refuse_if_held()
            self._check_earlier_run(folder, key)
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise UserError(
                f"{key}={folder} cannot be written: {there} is not a folder that you may write to",
                fix=f"set {key} to a folder that you may write to",
            )

    def _check_earlier_run(self, folder: Path, key: str) -> None:
        checkpoint = next(self.checkpoints_folder(folder).glob(f"*/{TRAINER_STATE}"), None)
        results = [path for path in (self.nemo_path(folder), self.adapters_path(folder)) if path.exists()]
        if checkpoint is None and results and self.checkpoint_callback_params.writes_result:
            raise UserError(
                f"{results[0]} exists: a run in {key}={folder} has ended, and its result is not overwritten",
                fix=f"set {key} to another folder, or move {' and '.join(path.name for path in results)} away",
            )
        if checkpoint is not None and not self.resume_if_exists:
            raise UserError(
                f"{key}={folder} holds checkpoints of an earlier run, and exp_manager.resume_if_exists=False",
                fix=f"set {key} to another folder, or exp_manager.resume_if_exists=True to go on",
            )


class _LogFile(logging.FileHandler):
    """log.txt; a disk that is full costs its lines, and is reported once."""

    _is_reported = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Instead of a traceback for each line."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._is_reported:
            self._is_reported = True
            sys.stderr.write(f"{self.baseFilename} cannot be written: {error.strerror}\n")

    def close(self) -> None:
        """Lines that could not be written cannot be now."""
        try:
            super().close()
        except OSError:
            assert self._is_reported


class Experiment:
    """An open run folder. ``log`` is a no-op on all ranks but the writing one.

    Args:
        folder: as :meth:`ExperimentConfig.folder` gives it, the same on every rank.
        writes: whether this rank writes.
        lock: of the folder, where this rank writes and other runs might.
    """

    def __init__(
        self, config: ExperimentConfig, folder: Path, *, writes: bool, lock: FolderLock | None = None
    ) -> None:
        self.config, self.folder, self.writes, self._lock = config, folder, writes, lock
        self._open = contextlib.ExitStack()
        self._sinks = contextlib.ExitStack()  # of metrics
        self.identity: RunIdentity | None = None
        self._status = RunStatus(path=folder / STATUS)
        self._metrics: RawIOBase | None = None
        self._tensorboard: SummaryWriter | None = None
        self._wandb: WandbRun | None = None

    @property
    def nemo_path(self) -> Path:
        """Where the trained model goes."""
        return self.config.nemo_path(self.folder)

    @property
    def adapters_path(self) -> Path:
        """Where the adapters that were trained go, as PEFT reads them."""
        return self.config.adapters_path(self.folder)

    @property
    def checkpoints_folder(self) -> Path:
        """Where checkpoints go."""
        return self.config.checkpoints_folder(self.folder)

    @property
    def lost_to(self) -> str | None:
        """The run that has taken the folder over; None: it is still this one's."""
        return self._lock.lost_to if self._lock else None

    def __enter__(self) -> Self:
        if self.writes:
            self.config.make_folder(self.folder)
            handler = _LogFile(self.folder / "log.txt", encoding="utf-8")
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            root = logging.getLogger()
            root.addHandler(handler)
            self._open.callback(handler.close)
            self._open.callback(root.removeHandler, handler)
            root.removeHandler(_early)
            _early.setTarget(handler)
            _early.flush()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.writes and self.identity is not None:
            self._status.end(error)
        self._sinks.close()
        self._open.close()
        self._metrics = self._tensorboard = self._wandb = None

    def start(self, identity: RunIdentity) -> None:
        """The folder is this run's from here on: what it is, and how far, stands in it."""
        self.identity = identity
        if self.writes:
            logger.info("command: %s", identity.command)
            with report_if_full(self.folder, "what the run is"):
                identity.write(self.folder)
            self._status.write()

    def begin(self, step: int, *, max_steps: int | None = None) -> None:
        """Open metrics.jsonl, tables, TensorBoard and wandb for what comes after ``step`` steps.

        What this or an earlier run in the folder has logged beyond that is taken back: those steps are done again.

        Args:
            max_steps: of the run; None: it is not known.
        """
        if not self.writes:
            return
        self._status.begin(step, max_steps)
        self._sinks.close()
        metrics = self.folder / METRICS
        with report_if_full(self.folder, METRICS):
            for path in (metrics, *self.folder.glob("table_*.jsonl")):
                rewind(path, step or -1)  # what stands at step 0 is of a run that begins anew
            # Without a buffer, which would try again at the end what has failed before.
            self._metrics = self._sinks.enter_context(metrics.open("ab", buffering=0))
        if self.config.create_tensorboard_logger:
            # Imported here: it takes a second, and only one rank writes.
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(self.folder / "tensorboard", purge_step=step + 1)
            self._sinks.callback(self._tensorboard.close)
        if self.config.create_wandb_logger:
            self._wandb = self._open_wandb()
            self._sinks.callback(self._wandb.finish)

    def _open_wandb(self) -> "WandbRun":
        import wandb

        kwargs, name = self.config.wandb_logger_kwargs, self.config.name
        identity = self.folder / "wandb_id"
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        return wandb.init(
            project=kwargs.project or name,
            name=kwargs.name or name,
            dir=self.folder,
            id=identity.read_text(),
            resume="allow",
        )

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Add a line to metrics.jsonl, and a point to TensorBoard and wandb, for ``step`` steps done."""
        if self._metrics is None:
            return
        values = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
        with report_if_full(self.folder, f"the metrics of step {step}"):
            append(self._metrics, record({"step": step, "time": round(time.time(), 3), **values}))
            if self._tensorboard is not None:
                for name, value in metrics.items():
                    self._tensorboard.add_scalar(name, value, step)
        self._status.advance(step)
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def log_rows(self, table: str, rows: Sequence[Mapping[str, str | float]], *, step: int) -> None:
        """Add rows to ``table_<table>.jsonl``, and to a table of that name at wandb."""
        if self._metrics is None or not rows:
            return
        path = self.folder / f"table_{table}.jsonl"
        with report_if_full(self.folder, path.name), path.open("ab", buffering=0) as file:
            append(file, "".join(record({"step": step, **row}) for row in rows))
        if self._wandb is not None:
            import wandb

            columns: list[str | int] = ["step", *rows[0]]
            content: list[Any] = [[step, *row.values()] for row in rows]
            self._wandb.log({f"table/{table}": wandb.Table(columns=columns, data=content)}, step=step)
