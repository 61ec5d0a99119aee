# SPDX-License-Identifier: Apache-2.0
"""When a run validates and when it stops: pure arithmetic on the settings and the size of the data."""

from dataclasses import dataclass

from nemo_aligner.errors import UserError

__all__ = ["Plan", "SupervisedConfig", "limited", "make_plan"]


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """The ``trainer.sft`` block (and its kin of other supervised algorithms)."""

    max_epochs: int = 1  # passes over the training data
    max_steps: int = -1  # stop after this many optimizer steps; -1: no limit
    val_check_interval: int | float = 100  # steps between validations; a float is a share of an epoch
    save_interval: int = 100  # steps between checkpoints
    limit_train_batches: int | float | None = 1.0  # batches of an epoch: a number, or a share up to 1.0
    limit_val_batches: int | float | None = 1.0  # batches of a validation: a number, or a share up to 1.0
    gradient_clip_val: float = 1.0  # the gradient's norm is cut to this; 0: never

    def check(self, block: str) -> None:
        """Refuse a run that would do no step; ``block`` is where these settings stand, as in "trainer.sft"."""
        for name, value, wrong, cure in (
            ("max_epochs", self.max_epochs, self.max_epochs < 1, "1 or more"),
            ("max_steps", self.max_steps, self.max_steps == 0, "-1 (no limit), or 1 or more"),
            (
                "limit_train_batches",
                self.limit_train_batches,
                self.limit_train_batches == 0,
                "1.0 (all batches)",
            ),
            ("val_check_interval", self.val_check_interval, self.val_check_interval < 0, "0 (never) or more"),
            ("gradient_clip_val", self.gradient_clip_val, self.gradient_clip_val < 0, "0 (never) or more"),
        ):
            if wrong:
                raise UserError(f"{block}.{name}={value} makes no run", cure=f"set {block}.{name} to {cure}")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run, counted in optimizer steps."""

    steps_per_epoch: int
    max_steps: int
    val_check_interval: int  # steps between validations; 0: none
    val_batches: int  # global batches of one validation

    def validates_after(self, step: int) -> bool:
        """Whether validation follows once ``step`` steps are done (from 1)."""
        if self.val_batches == 0 or self.val_check_interval == 0:
            return False
        return step % self.val_check_interval == 0 or step == self.max_steps


def limited(total: int, limit: int | float | None) -> int:
    """How many of ``total`` batches a ``limit_*_batches`` setting leaves.

    An int is a number of batches, a float up to 1.0 a share of them, at least one unless it is 0; None and negative
    values mean all.

    >>> limited(50, 40), limited(50, 0.1), limited(50, 0.001), limited(50, 1.0), limited(50, None), limited(50, -1)
    (40, 5, 1, 50, 50, 50)
    """
    if limit is None or limit < 0:
        return total
    if isinstance(limit, int):
        return min(total, limit)
    return total if limit >= 1.0 else _share(total, limit)


def _share(total: int, share: float) -> int:
    return max(1, int(total * share)) if share > 0 else 0


def make_plan(
    *,
    batches_per_epoch: int,
    max_epochs: int,
    max_steps: int,
    val_check_interval: int | float,
    limit_train_batches: int | float | None,
    val_batches: int,
    limit_val_batches: int | float | None,
) -> Plan:
    """The run that these settings make of data with ``batches_per_epoch`` global batches.

    Raises:
        UserError: it would do no step.
    """
    steps_per_epoch = limited(batches_per_epoch, limit_train_batches)
    total = steps_per_epoch * max_epochs
    if max_steps >= 0:
        total = min(total, max_steps)
    if total == 0:
        raise UserError(
            f"the run would do no step: max_epochs={max_epochs}, max_steps={max_steps}, limit_train_batches="
            f"{limit_train_batches} of {batches_per_epoch} batches an epoch",
            cure="set max_epochs to 1 or more, max_steps to -1 and limit_train_batches to 1.0",
        )
    interval = val_check_interval
    if isinstance(interval, float):
        interval = _share(steps_per_epoch, interval)
    return Plan(
        steps_per_epoch=steps_per_epoch,
        max_steps=total,
        val_check_interval=max(0, interval),
        val_batches=limited(val_batches, limit_val_batches),
    )
