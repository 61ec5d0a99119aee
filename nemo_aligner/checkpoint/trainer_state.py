# SPDX-License-Identifier: Apache-2.0
"""Where a run stood when a checkpoint was written: trainer_state.json, and the checkpoints that a folder has."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from nemo_aligner.errors import UserError
from nemo_aligner.run.experiment import TRAINER_STATE

__all__ = [
    "EXTRA",
    "UNFINISHED",
    "Checkpoint",
    "TrainerState",
    "find_checkpoints",
    "read_checkpoint",
    "read_extra",
    "scan_checkpoints",
]

EXTRA = "algorithm.bin"  # what the loop goes on from beside trainer_state.json
UNFINISHED = ".saving-"


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """Where a run stands between two steps."""

    step: int = 0  # optimizer steps done
    consumed_samples: int = 0
    metrics: dict[str, float] = field(
        default_factory=dict
    )  # of the last validation, by monitor name: val_loss
    data: dict[str, Any] = field(
        default_factory=dict
    )  # what makes up the batches; another value, other batches
    algorithm: dict[str, Any] = field(default_factory=dict)  # what else the loop goes on from
    skipped_steps: int = 0  # optimizer steps in a row, up to now, whose loss or gradient was not finite
    first_skipped: str = ""  # what was not finite in the first of them
    base_model: str = ""  # digest of the model that the run began with; "": not known


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A finished checkpoint."""

    path: Path
    state: TrainerState

    def stored(self, key: str) -> Any:  # noqa: ANN401 - of the kind that _ALGORITHM has for it
        """What the loop has put into ``algorithm`` under this key.

        Raises:
            UserError: it is not there.
        """
        if key not in self.state.algorithm:
            raise _damaged(self.path / TRAINER_STATE, f'"algorithm.{key}" is missing')
        return self.state.algorithm[key]


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
            cure="name a folder below a run's checkpoints/; a .nemo is started from with model.restore_from_path",
        ) from error
    return Checkpoint(path=path.resolve(), state=_checked(stored, file))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_table(value: object) -> bool:
    return isinstance(value, dict)


def _is_metrics(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(one, int | float) and not isinstance(one, bool) for one in value.values()
    )


_Kind = tuple[Callable[[object], bool], str]

_COUNT: _Kind = (_is_count, "a whole number, 0 or more")
_NUMBERS: _Kind = (_is_metrics, "an object of numbers")
_STATE: dict[str, _Kind] = {
    "step": _COUNT,
    "consumed_samples": _COUNT,
    "metrics": _NUMBERS,
    "data": (_is_table, "an object"),
    "algorithm": (_is_table, "an object"),
}
_TEXT: _Kind = (lambda value: isinstance(value, str), "a text")
_OPTIONAL: dict[str, _Kind] = {"base_model": _TEXT, "skipped_steps": _COUNT, "first_skipped": _TEXT}
_ALGORITHM: dict[str, _Kind] = {
    "ppo_optimization_step": _COUNT,
    "validated_step": _COUNT,
    "unvalidated_step": _COUNT,
    "kl": _NUMBERS,
    "reward_scaling": _NUMBERS,
    "critic_sequence": _COUNT,
    "sequence": _COUNT,
    "run_id": _TEXT,
    "is_half": (lambda value: isinstance(value, bool), "true or false"),
}


def _checked(stored: object, file: Path) -> TrainerState:
    """``stored`` as a state, if it is one that a run has written."""
    if not isinstance(stored, dict):
        raise _damaged(file, f"it holds {_shown(stored)}, not an object")
    if missing := [key for key in _STATE if key not in stored]:
        raise _damaged(file, f'"{missing[0]}" is missing')
    _check_kinds(stored, _STATE | _OPTIONAL, file, "")
    _check_kinds(stored["algorithm"], _ALGORITHM, file, "algorithm.")
    known = {one.name for one in fields(TrainerState)}
    if unknown := sorted(set(stored) - known):
        raise _damaged(file, f'"{unknown[0]}" is unknown')
    return TrainerState(**stored)


def _check_kinds(values: dict[str, Any], kinds: dict[str, _Kind], file: Path, prefix: str) -> None:
    for key, (fits, kind) in kinds.items():
        if key in values and not fits(values[key]):
            raise _damaged(file, f'"{prefix}{key}" is {_shown(values[key])}, not {kind}')


def _damaged(file: Path, what: str) -> UserError:
    return UserError(
        f"{file} is not what a run has written: {what}",
        cure="put the file back as the run wrote it, or move its folder away and go on from another checkpoint",
    )


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def read_extra(checkpoint: Checkpoint) -> bytes | None:
    """What was saved as ``extra``."""
    path = checkpoint.path / EXTRA
    return path.read_bytes() if path.exists() else None
