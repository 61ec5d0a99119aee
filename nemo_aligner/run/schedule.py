# SPDX-License-Identifier: Apache-2.0
"""When a run validates and when it stops: pure arithmetic on the settings and the size of the data."""

from dataclasses import dataclass
from typing import ClassVar

from nemo_aligner.bounds import bounded
from nemo_aligner.errors import UserError

_NO_RUN = ("{key}={value}: must be {range}", "set {key} to {range}")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The common settings of every training algorithm under ``trainer``."""

    block: ClassVar[str] = "trainer"  # where these settings stand

    # passes over the training data; null: one, or as many as max_steps asks for
    max_epochs: int | None = bounded(None, at_least=1, message=_NO_RUN)
    # steps of the run (of PPO: rollouts), unless max_epochs is given and over before; -1: max_epochs decides
    max_steps: int = -1
    # steps between validations; a float is a share of an epoch; 0: never
    val_check_interval: int | float = bounded(100, at_least=0, to="0 (never) or more", message=_NO_RUN)
    val_before_train: bool = False  # validate before the first step too
    # steps between checkpoints; a float is a share of an epoch; 0: at the end only
    save_interval: int | float = bounded(100, at_least=0, to="0 (at the end only) or more", message=_NO_RUN)
    # the gradient's norm is cut to this; 0: never
    gradient_clip_val: float = bounded(1.0, at_least=0, to="0 (never) or more", message=_NO_RUN)
    # steps in a row whose loss or gradient is not finite, after which the run ends
    max_skipped_steps: int = bounded(10, at_least=1, message=_NO_RUN)

    @property
    def passes(self) -> tuple[int | None, str]:
        """(passes over the training data in all, None where they are left open; the setting that says so)."""
        return self.max_epochs, f"{self.block}.max_epochs={self.max_epochs}"

    def check(self, block: str) -> None:
        """Raise UserError for settings without a valid run; ``block`` is their section, as in "trainer.sft"."""
        if self.max_steps == 0:
            raise UserError(
                f"{block}.max_steps=0: must be -1 or >= 1",
                fix=f"set {block}.max_steps to -1 (max_epochs decides), or 1 or more",
            )
        if self.val_before_train and not self.val_check_interval:
            raise UserError(
                f"{block}.val_before_train=True, and {block}.val_check_interval=0: there is no validation",
                fix=f"set {block}.val_check_interval above 0, or {block}.val_before_train=False",
            )


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(LoopConfig):
    """The ``trainer.sft`` block (and its kin of other supervised algorithms)."""

    block: ClassVar[str] = "trainer.sft"
    limit_train_batches: int | float | None = 1.0  # batches of an epoch: a number, or a share up to 1.0
    limit_val_batches: int | float | None = 1.0  # batches of a validation: a number, or a share up to 1.0
    # responses that are generated at each validation, to the prompts of the first validation rows; 0: none
    val_responses: int = bounded(0, at_least=0, to="0 (none) or more")
    val_response_length: int = bounded(64, at_least=1)  # tokens of each of them, at most

    def check(self, block: str) -> None:
        """See LoopConfig."""
        LoopConfig.check(self, block)
        if self.limit_train_batches == 0:
            raise UserError(
                f"{block}.limit_train_batches=0: must be > 0, or 1.0 for all batches",
                fix=f"set {block}.limit_train_batches to 1.0 (all batches)",
            )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run, counted in optimizer steps."""

    steps_per_epoch: int
    max_steps: int
    save_interval: int  # steps between checkpoints; 0: only where the run ends
    val_check_interval: int  # steps between validations; 0: none
    val_batches: int  # global batches of one validation
    set_by: str = ""  # the setting that makes the run as long as this

    def saves_after(self, step: int) -> bool:
        """True if a checkpoint follows once ``step`` steps are done (from 1)."""
        return step == self.max_steps or (self.save_interval > 0 and step % self.save_interval == 0)

    def validates_after(self, step: int) -> bool:
        """True if validation follows once ``step`` steps are done (from 1; from 0 with val_before_train)."""
        if self.val_batches == 0 or self.val_check_interval == 0:
            return False
        return step % self.val_check_interval == 0 or step == self.max_steps


def limited(total: int, limit: int | float | None) -> int:
    """How many of ``total`` batches a ``limit_*_batches`` setting leaves; of tokens alike.

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


def _interval(value: int | float, steps_per_epoch: int) -> int:
    """Steps; a float is a share of an epoch."""
    return max(0, _share(steps_per_epoch, value) if isinstance(value, float) else value)


def _length(config: LoopConfig, steps_per_epoch: int) -> tuple[int, str]:
    """(steps of the run, the setting that says so): the shorter of the two that are given, else one epoch."""
    by_steps = config.max_steps, f"{config.block}.max_steps={config.max_steps}"
    passes, said = config.passes
    if passes is None:
        if config.max_steps >= 0 and steps_per_epoch:
            return by_steps
        return (
            steps_per_epoch,
            f"one pass over the data, as neither {config.block}.max_epochs nor max_steps is set",
        )
    by_epochs = steps_per_epoch * passes, said
    return min(by_steps, by_epochs) if config.max_steps >= 0 else by_epochs


def make_plan(
    config: LoopConfig,
    *,
    batches_per_epoch: int,
    val_batches: int,
    limit_train: int | float | None = None,
    limit_val: int | float | None = None,
) -> Plan:
    """The run that these settings make of data with so many global batches.

    Args:
        limit_train: see :func:`limited`, of an epoch's batches.
        limit_val: of a validation's.

    Raises:
        UserError: it would do no step.
    """
    steps_per_epoch = limited(batches_per_epoch, limit_train)
    total, set_by = _length(config, steps_per_epoch)
    if total == 0:
        raise UserError(
            f"the run would do no step: {config.block}.max_epochs={config.max_epochs}, {config.block}.max_steps="
            f"{config.max_steps}, {config.block}.limit_train_batches={limit_train} of {batches_per_epoch} batches an "
            "epoch",
            fix=f"set {config.block}.max_epochs to 1 or more, max_steps to -1 and limit_train_batches to 1.0",
        )
    return Plan(
        steps_per_epoch=steps_per_epoch,
        max_steps=total,
        set_by=set_by,
        save_interval=_interval(config.save_interval, steps_per_epoch),
        val_check_interval=_interval(config.val_check_interval, steps_per_epoch),
        val_batches=limited(val_batches, limit_val),
    )
