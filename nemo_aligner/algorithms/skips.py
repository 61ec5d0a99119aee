# SPDX-License-Identifier: Apache-2.0
"""Optimizer steps that a model left out because a loss or a gradient was not finite: counted, logged, and not endless.

The count is a part of the trainer's state, so a run that goes on from a checkpoint stops where it would have stopped.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from nemo_aligner.checkpoint.trainer_state import TrainerState
from nemo_aligner.errors import Unwound, UserError
from nemo_aligner.parallel import world

logger = logging.getLogger(__name__)

FIX = (
    "set model.optim.lr lower; with trainer.precision=16 try bf16 or 32; look at the data of that step. "
    "Checkpoints hold finite weights only: exp_manager.resume_from_checkpoint, in a new exp_manager.explicit_log_dir, "
    "goes on from one of them"
)


class Diverged(Unwound):
    """A server's model can't learn any more; it ends the server, where a UserError would be reported to the client."""


class NotFinite(Unwound):
    """Nothing can be learned from a rollout: what is known of it is infinite or NaN. Raised on every rank alike."""


def check_finite(found: Mapping[str, Tensor], *, most: float = math.inf, fix: str) -> None:
    """Look at what is known of a rollout before anything is learned of it.

    Args:
        found: by name, the same on every rank.
        most: the largest absolute value that is of use.

    Raises:
        NotFinite: a number is infinite, NaN or beyond ``most``.
    """
    for name, numbers in found.items():
        # One of them would make all whitened advantages, and then the weights, NaN.
        fine = numbers.isfinite() & (numbers.abs() <= most)
        if not fine.all():
            count, first = int((~fine).sum()), numbers[~fine][0].item()
            problem = f"{count} of {numbers.numel()} {name} of this rollout are no use, the first of them: {first:g}"
            raise NotFinite(UserError(problem, fix=fix))


def counted(state: TrainerState, metrics: Mapping[str, float], *, step: int) -> TrainerState:
    """``state`` after optimizer step ``step``, whose ``metrics`` say whether it was skipped."""
    if not metrics["skipped_steps"]:
        return replace(state, skipped_steps=0, first_skipped="") if state.skipped_steps else state
    finite = math.isfinite(metrics["loss"])
    what = f"the gradient's norm is {metrics['grad_norm']}" if finite else f"the loss is {metrics['loss']}"
    found = f"in optimizer step {step} {what}"
    state = replace(state, skipped_steps=state.skipped_steps + 1, first_skipped=state.first_skipped or found)
    if world.is_logging_rank():
        logger.warning("optimizer step %d was skipped: %s (%d in a row)", step, what, state.skipped_steps)
    return state


def too_many(state: TrainerState, *, block: str, limit: int) -> UserError | None:
    """The error that ends a run after ``limit`` skipped steps in a row; ``block`` is the section of the setting."""
    if state.skipped_steps < limit:
        return None
    return UserError(
        f"{state.skipped_steps} optimizer steps in a row were skipped, and {block}.max_skipped_steps={limit}: "
        f"{state.first_skipped}",
        fix=FIX,
    )


def refuse_to_end(state: TrainerState) -> None:
    """Raise UserError if the last steps of a run were skipped.

    Raises:
        UserError: they were.
    """
    if state.skipped_steps:
        raise UserError(
            f"the last {state.skipped_steps} optimizer steps of the run were skipped: {state.first_skipped}",
            fix=FIX,
        )
