# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a run: written whole or not at all, the best of them kept, the newest found again.

A checkpoint is the extracted layout of a .nemo (``model_config.yaml``, tokenizer files, ``model_weights/``), so it is
also a model; beside them lie ``training_state/`` (the optimizer, as a distributed checkpoint) and
``trainer_state.json``. What a run goes on from stands in that file and never in a name.
"""

import contextlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nemo_aligner.checkpoint.digests import DIGESTS, Digests, write_digests
from nemo_aligner.checkpoint.finite import refuse_non_finite
from nemo_aligner.checkpoint.nemo_archive import WEIGHTS_NAME, write_contents, write_nemo
from nemo_aligner.checkpoint.sharded import (
    check_room_for_all,
    load_state,
    model_state,
    save_state,
    stored_bytes,
)
from nemo_aligner.checkpoint.trainer_state import (
    EXTRA,
    UNFINISHED,
    Checkpoint,
    TrainerState,
    find_checkpoints,
)
from nemo_aligner.models.gpt.learner import GPTLearner
from nemo_aligner.parallel import collectives, world
from nemo_aligner.run.disk import report_if_full
from nemo_aligner.run.experiment import TRAINER_STATE, CheckpointCallbackConfig
from nemo_aligner.run.identity import COMMAND, CONFIG, RunIdentity
from nemo_aligner.run.progress import heartbeat

STATE_FOLDER = "training_state"
# What a checkpoint holds beside a model.
TRAINING_NAMES = (STATE_FOLDER, TRAINER_STATE, EXTRA, COMMAND, CONFIG, DIGESTS)
LAST = "last"  # a link to the newest checkpoint
DAMAGED = "damaged"  # below it lies what was set aside

logger = logging.getLogger(__name__)

Newest = Callable[[list[Checkpoint]], list[Checkpoint]]


@dataclass(frozen=True, kw_only=True)
class _Save:
    """A checkpoint that is not one yet."""

    path: Path
    state: TrainerState
    written: Mapping[str, Future[Digests]]  # by the folder that is written
    also: Callable[[], None] | None
    needed: int  # bytes


def checkpoint_name(template: str, state: TrainerState, *, steps_per_epoch: int) -> str:
    """``template`` filled in: each {name} or {name:format} becomes name=value; one without a value is left out.

    >>> state = TrainerState(step=50, consumed_samples=6400, metrics={"val_loss": 2.34567})
    >>> checkpoint_name("sft--{val_loss:.3f}-{step}-{consumed_samples}-{epoch}", state, steps_per_epoch=100)
    'sft--val_loss=2.346-step=50-consumed_samples=6400-epoch=0'
    >>> checkpoint_name("sft--{val_loss:.3f}-{step}", TrainerState(step=50), steps_per_epoch=100)
    'sft-step=50'
    """
    values: Mapping[str, float] = {
        **state.metrics,
        **{name: value for name, value in state.algorithm.items() if isinstance(value, int | float)},
        "step": state.step,
        "consumed_samples": state.consumed_samples,
        "epoch": (state.step - 1) // steps_per_epoch,
    }

    def fill(match: re.Match[str]) -> str:
        value = values.get(monitor_name(match[2]))
        return "" if value is None else f"{match[1]}{match[2]}={value:{match[3] or ''}}"

    name = re.sub(r"(-*)\{([\w/]+)(?::([^}]*))?\}", fill, template)
    # Two checkpoints never share a name.
    return (name if "{step" in template else f"{name}-step={state.step}").replace("/", "_")


def monitor_name(name: str) -> str:
    """One name for a validation metric, however it is written.

    >>> monitor_name("validation_loss"), monitor_name("validation/loss"), monitor_name("val_loss")
    ('val_loss', 'val_loss', 'val_loss')
    >>> monitor_name("val_rollouts/rewards"), monitor_name("val_global_rewards")
    ('val_rewards', 'val_rewards')
    """
    return re.sub(r"^(validation[_/]|val_rollouts/|val_global_)", "val_", name)


class TrainingCheckpoints:
    """Saves, finds, loads and prunes. Every method is called by every rank; rank 0 alone touches folders.

    Args:
        folder: ``<run>/checkpoints``, on a disk that all nodes share.
        config: what is kept, and under which names.
        trained: whose tensors are saved.
        model_config: model_config.yaml's content.
        files: the other files of the .nemo, by name.
        keep: of all checkpoints, oldest first, those that are kept beside the best and the newest.
        identity: of the run, on rank 0; each checkpoint keeps it.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointCallbackConfig,
        trained: GPTLearner,
        *,
        model_config: dict[str, Any],
        files: Mapping[str, Path | bytes],
        keep: Newest = lambda _: [],
        identity: RunIdentity | None = None,
    ) -> None:
        self.folder, self.config, self._trained, self._keep = folder, config, trained, keep
        self._model_config, self._files, self._identity = model_config, files, identity
        self._executor = ThreadPoolExecutor(1, "save") if config.async_save else None
        self._pending: _Save | None = None

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load the training state of ``checkpoint``; its weights are loaded as those of any .nemo."""
        with heartbeat(f"resuming from {checkpoint.path}", enabled=world.is_logging_rank()):
            state = load_state(
                self._trained.training_state(),
                checkpoint.path / STATE_FOLDER,
                remedy="resume with the model.optim and the architecture that the run was started with",
            )
            self._trained.load_training_state(state)

    def save(
        self,
        state: TrainerState,
        *,
        steps_per_epoch: int,
        extra: bytes | None = None,
        also: Callable[[], None] | None = None,
    ) -> None:
        """Write a checkpoint; with ``async_save`` it is finished by a later :meth:`finish`.

        Args:
            extra: what :func:`read_extra` is to give.
            also: called on every rank when all is written; only if it returns, the checkpoint becomes one.

        Raises:
            UserError: a weight is not finite; nothing is written.
        """
        self.finish()
        refuse_non_finite(
            self._trained.model,
            problem=f"after step {state.step} the weights are broken, and no checkpoint is made of them",
            fix="set model.optim.lr lower, and go on from an earlier checkpoint: they hold finite weights only",
        )
        name = checkpoint_name(self.config.filename, state, steps_per_epoch=steps_per_epoch)
        staging = self.folder / f"{UNFINISHED}{name}"
        writes = world.is_logging_rank()
        if self._identity is not None:
            state = replace(state, base_model=self._identity.base_model)
        with heartbeat(f"saving {self.folder / name}", enabled=writes), world.phase(f"saving {name}"):
            weights, training = model_state(self._trained.model), self._trained.training_state()
            needed = self._check_room(weights, training, more=len(extra or b""))
            with self._dropped_if_failed(staging, needed):
                if writes:
                    self._write_small_files(staging, extra)
                world.barrier()
                written = {
                    WEIGHTS_NAME: save_state(weights, staging / WEIGHTS_NAME, executor=self._executor),
                    STATE_FOLDER: save_state(training, staging / STATE_FOLDER, executor=self._executor),
                }
        self._pending = _Save(path=self.folder / name, state=state, written=written, also=also, needed=needed)
        if self._executor is None:
            self.finish()

    def _write_small_files(self, staging: Path, extra: bytes | None) -> None:
        staging.mkdir(parents=True)
        write_contents(staging, config=self._model_config, files=self._files)
        if self._identity is not None:
            self._identity.write(staging)
        if extra is not None:
            (staging / EXTRA).write_bytes(extra)

    def check_room(self) -> None:
        """Raise UserError if the disk has no room for a checkpoint.

        Raises:
            UserError: on every rank.
        """
        self._check_room(model_state(self._trained.model), self._trained.training_state(), more=0)

    def _check_room(self, weights: dict[str, Any], training: dict[str, Any], *, more: int) -> int:
        """The bytes of a checkpoint of these; ``more``: of what rank 0 writes beside them."""
        own, model = stored_bytes(training), stored_bytes(weights)
        # Beside a checkpoint its .nemo is made, of a copy.
        copies = 3 if self.config.always_save_nemo else 1
        return check_room_for_all(self.folder, own + copies * model, "a checkpoint", spare=more)

    @contextlib.contextmanager
    def _dropped_if_failed(self, staging: Path, needed: int) -> Iterator[None]:
        """Within it, a save that fails leaves its disk's room to the next try; a full disk is reported as one."""
        try:
            with report_if_full(self.folder, "a checkpoint", needed=needed):
                yield
        except Exception:
            if world.is_logging_rank():
                shutil.rmtree(staging, ignore_errors=True)
            raise

    @property
    def is_writing(self) -> bool:
        """True if this rank still writes in the background."""
        return self._pending is not None and not all(
            future.done() for future in self._pending.written.values()
        )

    def finish(self) -> None:
        """Wait for the save in the background, if there is one, and make it a checkpoint."""
        if self._pending is None:
            return
        save, self._pending = self._pending, None
        staging = save.path.with_name(UNFINISHED + save.path.name)
        with world.phase(f"saving {save.path.name}"), self._dropped_if_failed(staging, save.needed):
            with world.at_own_pace():
                own = {
                    f"{folder}/{name}": digest
                    for folder, future in save.written.items()
                    for name, digest in future.result().items()
                }
            digests = {name: one for part in collectives.of_all_ranks(own) for name, one in part.items()}
            if save.also is not None:
                save.also()
            with world.at_own_pace():
                if world.is_logging_rank():
                    self._commit(save.path, save.state, digests)

    def holds(self, step: int) -> bool:
        """True if there is a checkpoint of ``step``. A collective."""
        found = world.is_logging_rank() and step in (c.state.step for c in find_checkpoints(self.folder))
        return collectives.broadcast_object(found)

    def discard(self, is_over: Callable[[Checkpoint], bool]) -> None:
        """Remove the checkpoints that are over, and what a save has left that did not become one."""
        if self._pending is not None:
            # A thread that still writes would find its folder gone; how its save ends is of no matter now.
            wait(self._pending.written.values())
            self._pending = None
        world.barrier()
        with world.at_own_pace():
            if world.is_logging_rank():
                remove_unfinished(self.folder)
                for checkpoint in find_checkpoints(self.folder):
                    if is_over(checkpoint):
                        logger.info("removing %s: the run goes on from before it", checkpoint.path)
                        _remove(checkpoint.path)

    def _commit(self, path: Path, state: TrainerState, digests: Digests) -> None:
        staging = path.with_name(UNFINISHED + path.name)
        with (staging / TRAINER_STATE).open("w") as stream:
            json.dump(asdict(state), stream, indent=2)
            stream.flush()
            os.fsync(stream.fileno())
        write_digests(staging, digests)
        staging.rename(path)
        _sync(self.folder)
        _link(self.folder / LAST, path.name)
        logger.info("saved %s", path)
        if self.config.always_save_nemo:
            self._pack(path, path.with_name(path.name + ".nemo"), overwrite=False)
        self._prune()

    def _prune(self) -> None:
        found = find_checkpoints(self.folder)
        for checkpoint in prunable(found, self.config, keep=self._keep):
            _remove(checkpoint.path)

    def _pack(self, checkpoint: Path, path: Path, *, overwrite: bool) -> None:
        def copy_weights(folder: Path) -> None:
            shutil.copytree(checkpoint / WEIGHTS_NAME, folder)

        write_nemo(
            path, config=self._model_config, files=self._files, weights=copy_weights, overwrite=overwrite
        )

    def best(self) -> Checkpoint:
        """The checkpoint that the monitor ranks first."""
        self.finish()
        found = collectives.from_rank_0(lambda: ranked(find_checkpoints(self.folder), self.config)[0])
        if world.is_logging_rank():
            logger.info("the best checkpoint by %s is %s", self.config.monitor, found.path.name)
        return found

    def save_best(self, path: Path) -> None:
        """Write :meth:`best` as a .nemo."""
        best = self.best()
        with world.phase(f"saving {path}"), world.at_own_pace():
            if world.is_logging_rank():
                self._pack(best.path, path, overwrite=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what saves that were interrupted have left."""
    for path in folder.glob(f"{UNFINISHED}*"):
        logger.info("removing %s: its save was interrupted", path)
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)


def set_aside(path: Path, *, newest: Path) -> None:
    """Move a damaged checkpoint to where no run looks for one; ``newest`` is then the newest."""
    aside = path.parent / DAMAGED
    aside.mkdir(exist_ok=True)
    names = itertools.chain([path.name], (f"{path.name}.{number}" for number in itertools.count(2)))
    target = next(aside / name for name in names if not (aside / name).exists())
    path.rename(target)
    logger.warning("%s is set aside as %s", path, target)
    _link(path.parent / LAST, newest.name)


def ranked(checkpoints: list[Checkpoint], config: CheckpointCallbackConfig) -> list[Checkpoint]:
    """Best first by the monitor, among equals the newer first; without a value for it, last."""
    name, sign = monitor_name(config.monitor), -1 if config.mode == "max" else 1

    def key(checkpoint: Checkpoint) -> tuple[float, int]:
        value = checkpoint.state.metrics.get(name, float("nan"))
        return (sign * value if value == value else float("inf")), -checkpoint.state.step

    return sorted(checkpoints, key=key)


def prunable(
    checkpoints: list[Checkpoint], config: CheckpointCallbackConfig, *, keep: Newest = lambda _: []
) -> list[Checkpoint]:
    """Those that are neither among the best ``save_top_k`` nor the newest, nor among those that ``keep`` names.

    Of those whose last step was not skipped the newest stays as well: beyond it nothing may be worth going on from.
    """
    if config.save_top_k < 0:
        return []
    in_order = sorted(checkpoints, key=lambda checkpoint: checkpoint.state.step)
    sound = [checkpoint for checkpoint in in_order if not checkpoint.state.skipped_steps]
    newest = [*keep(in_order), *in_order[-1:], *sound[-1:]]
    return [c for c in ranked(checkpoints, config)[config.save_top_k :] if c not in newest]


def _remove(path: Path) -> None:
    # Renamed first: what is only half removed must not be found again.
    shutil.rmtree(path.rename(path.with_name(UNFINISHED + path.name)))
    path.with_name(path.name + ".nemo").unlink(missing_ok=True)


def _link(link: Path, target: str) -> None:
    fresh = link.with_name(f"{UNFINISHED}{link.name}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)


def _sync(folder: Path) -> None:
    """Have the disk hold the folder's entries as they are now."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
