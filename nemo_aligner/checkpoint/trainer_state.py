# SPDX-License-Identifier: Apache-2.0
"""Where a run stood when a checkpoint was written: trainer_state.json, and the checkpoints that a folder has."""

import json
import typing
from collections.abc import Callable, Collection
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from nemo_aligner.errors import UserError
from nemo_aligner.run.experiment import TRAINER_STATE

EXTRA = "algorithm.bin"  # what the loop goes on from beside trainer_state.json
UNFINISHED = ".saving-"
_NEEDED = ("step", "consumed_samples", "metrics", "data", "algorithm")

A = TypeVar("A")


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """Where a run stands between two steps."""

    step: int = 0  # optimizer steps done
    consumed_samples: int = 0
    # of the last validation, by monitor name: val_loss
    metrics: dict[str, float] = field(default_factory=dict)
    # what makes up the batches; another value, other batches
    data: dict[str, Any] = field(default_factory=dict)
    algorithm: dict[str, Any] = field(default_factory=dict)  # the loop's own dataclass, by its fields
    skipped_steps: int = 0  # optimizer steps in a row, up to now, whose loss or gradient was not finite
    first_skipped: str = ""  # what was not finite in the first of them
    base_model: str = ""  # digest of the model that the run began with; "": not known


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A finished checkpoint."""

    path: Path
    state: TrainerState

    def algorithm(self, kind: type[A]) -> A:
        """The loop's own state in ``algorithm``, as the dataclass that it had there.

        Raises:
            UserError: a key is missing, or has a value of another type.
        """
        return _read(self.state.algorithm, kind, self.path / TRAINER_STATE, "algorithm.")


def find_checkpoints(folder: Path) -> list[Checkpoint]:
    """The finished checkpoints in ``folder``, oldest first.

    Raises:
        UserError: a trainer_state.json cannot be read.
    """
    found, unreadable = scan_checkpoints(folder)
    for error in unreadable.values():
        raise error
    return found


def scan_checkpoints(folder: Path) -> tuple[list[Checkpoint], dict[Path, UserError]]:
    """The finished checkpoints in ``folder``, oldest first; and what is wrong with those that cannot be read."""
    found: list[Checkpoint] = []
    unreadable: dict[Path, UserError] = {}
    for path in sorted(folder.glob(f"*/{TRAINER_STATE}")):
        if not path.parent.name.startswith(UNFINISHED) and not path.parent.is_symlink():
            try:
                found.append(read_checkpoint(path.parent))
            except UserError as error:
                unreadable[path.parent] = error
    return sorted(found, key=lambda checkpoint: checkpoint.state.step), unreadable


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at ``path``.

    Raises:
        UserError: it is none, or its trainer_state.json is not what a run writes.
    """
    file = path / TRAINER_STATE
    try:
        stored = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not a training checkpoint: {TRAINER_STATE} in it cannot be read ({error})",
            fix="name a folder below a run's checkpoints/; a .nemo is started from with model.restore_from_path",
        ) from error
    state = _read(stored, TrainerState, file, needed=_NEEDED)
    if unknown := sorted(set(stored) - {one.name for one in fields(TrainerState)}):
        raise _damaged(file, f'"{unknown[0]}" is unknown')
    return Checkpoint(path=path.resolve(), state=state)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


_Kind = tuple[Callable[[Any], bool], str]
_KINDS: dict[object, _Kind] = {
    int: (_is_count, "a whole number, 0 or more"),
    int | None: (lambda value: value is None or _is_count(value), "a whole number, 0 or more, or null"),
    float | None: (lambda value: value is None or _is_number(value), "a number or null"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
    str: (lambda value: isinstance(value, str), "a text"),
    list[float]: (lambda value: isinstance(value, list) and all(map(_is_number, value)), "a list of numbers"),
    dict[str, Any]: (lambda value: isinstance(value, dict), "an object"),
    dict[str, float]: (
        lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
        "an object of numbers",
    ),
}


def _read(stored: object, kind: type[A], file: Path, prefix: str = "", *, needed: Collection[str] = ()) -> A:
    """``stored`` as a ``kind``, if it is one that a run has written; without what a ``kind`` does not have."""
    if not isinstance(stored, dict):
        raise _damaged(file, f"it holds {_shown(stored)}, not an object")
    hints, given = typing.get_type_hints(kind), {}
    for spec in fields(kind):  # type: ignore[arg-type]
        name, (fits, wanted) = spec.name, _KINDS[hints[spec.name]]
        if name in stored:
            if not fits(value := stored[name]):
                raise _damaged(file, f'"{prefix}{name}" is {_shown(value)}, not {wanted}')
            given[name] = value
        elif name in needed or (spec.default is MISSING and spec.default_factory is MISSING):
            raise _damaged(file, f'"{prefix}{name}" is missing')
    return kind(**given)


def _damaged(file: Path, what: str) -> UserError:
    return UserError(
        f"{file} is not what a run has written: {what}",
        fix="put the file back as the run wrote it, or move its folder away and go on from another checkpoint",
    )


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def read_extra(checkpoint: Checkpoint) -> bytes | None:
    """The bytes that were saved as ``extra``."""
    path = checkpoint.path / EXTRA
    return path.read_bytes() if path.exists() else None
