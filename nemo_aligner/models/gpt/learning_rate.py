# SPDX-License-Identifier: Apache-2.0
"""The ``model.optim`` block and the learning rate that it makes of a step's number. Pure; imports no torch."""

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from nemo_aligner.bounds import bounded, check_bounds
from nemo_aligner.errors import UserError

_NOT_POSITIVE = "{key}={value} is not positive"
# Where the settings give no number; NeMo's defaults.
MOST_HELD = 1000  # steps at the lowest rate
USUAL_LOWEST = 9e-7


@dataclass(frozen=True, kw_only=True)
class SchedConfig:
    """The ``model.optim.sched`` block."""

    # after the warm-up: CosineAnnealing, WarmupAnnealing (a line), WSD or constant
    name: Literal[
        "CosineAnnealing", "WarmupAnnealing", "WSD", "constant", "WarmupPolicy", "WarmupHoldPolicy"
    ] = "CosineAnnealing"
    # steps of linear growth from lr / (warmup_steps + 1) to lr; a float below 1 is a share of the run
    warmup_steps: int | float = 10
    # last steps, held at min_lr; a float below 1 is a share of the run; null: a tenth of it, at most 1000
    constant_steps: int | float | None = None
    # where the decay ends; null: 9e-7, or a tenth of a smaller lr
    min_lr: float | None = None
    # of WSD: steps of its decay, or a share of the run; until then the rate stays at lr
    decay_steps: int | float | None = None
    # of WSD: linear, cosine, minus_sqrt or exponential
    decay_style: Literal["linear", "cosine", "minus_sqrt", "exponential"] = "linear"

    @property
    def decays(self) -> bool:
        """True if the rate falls from lr to min_lr."""
        return self.name in ("CosineAnnealing", "WarmupAnnealing", "WSD")

    def lowest(self, lr: float) -> float:
        """The rate that a decay from ``lr`` ends at.

        >>> SchedConfig().lowest(5e-6), SchedConfig().lowest(5e-7)
        (9e-07, 5e-08)
        """
        if self.min_lr is not None:
            return self.min_lr
        return USUAL_LOWEST if lr >= USUAL_LOWEST else lr / 10

    def in_steps(self, max_steps: int) -> "SchedSteps":
        """The parts of a run of ``max_steps``.

        >>> SchedConfig().in_steps(50)
        SchedSteps(warmup=10, held=5, decay=0)
        >>> SchedConfig(warmup_steps=0.1, constant_steps=0.0).in_steps(50)
        SchedSteps(warmup=5, held=0, decay=0)
        """
        held = min(MOST_HELD, max_steps // 10) if self.constant_steps is None else self.constant_steps
        parts = self.warmup_steps, held, self.decay_steps or 0
        return SchedSteps(*(int(part * max_steps) if isinstance(part, float) else part for part in parts))

    def check(self, block: str) -> None:
        """Raise UserError for what is neither a number of steps nor a share of them."""
        for name in ("warmup_steps", "constant_steps", "decay_steps"):
            value = getattr(self, name)
            if value is not None and (value < 0 or (isinstance(value, float) and value >= 1)):
                raise UserError(
                    f"{block}.{name}={value} is neither a number of steps nor a share of the run",
                    fix=f"set {block}.{name} to a whole number, 0 or more, or to a share from 0.0 to below 1.0",
                )


class SchedSteps(NamedTuple):
    """Steps of a run's parts."""

    warmup: int
    held: int  # the last ones
    decay: int  # of WSD; 0: not given


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The ``model.optim`` block."""

    # AdamW, its state dealt out over data parallel ranks; adam, adamw and fused_adam mean the same
    name: Literal["distributed_fused_adam", "fused_adam", "adam", "adamw"] = "distributed_fused_adam"
    # peak learning rate
    lr: float = bounded(3e-5, above=0, message=(_NOT_POSITIVE, "set {key}, for instance to 5e-6"))
    weight_decay: float = 0.01  # decoupled weight decay, on matrices only
    betas: tuple[float, float] = (0.9, 0.98)  # decay of Adam's first and second moment
    eps: float = 1e-8  # added to Adam's denominator
    overlap_grad_sync: bool = False  # sum gradients over data parallel ranks while the backward goes on
    overlap_param_sync: bool = False  # gather weights while the next forward goes on; needs overlap_grad_sync
    # with overlap: MiB of fp32 gradients that are summed together
    bucket_cap_mb: float = bounded(200.0, above=0, message=(_NOT_POSITIVE, "set {key}, for instance to 200"))
    # learning rate over the optimizer steps
    sched: SchedConfig = field(default_factory=SchedConfig)

    def check(self) -> None:
        """Raise UserError for a rate or schedule that cannot train."""
        check_bounds(self, "model.optim")
        self.sched.check("model.optim.sched")
        if self.overlap_param_sync and not self.overlap_grad_sync:
            raise UserError(
                "model.optim.overlap_param_sync=True needs model.optim.overlap_grad_sync=True",
                fix="set both to True, or both to False",
            )
        if self.sched.name == "WSD" and not self.sched.decay_steps:
            raise UserError(
                "model.optim.sched.name=WSD needs model.optim.sched.decay_steps, the steps of its decay",
                fix="set model.optim.sched.decay_steps, for instance to a tenth of the run's steps",
            )
        if self.sched.name != "WSD" and self.sched.decay_steps is not None:
            raise UserError(
                f"model.optim.sched.decay_steps={self.sched.decay_steps} is for model.optim.sched.name=WSD, which is "
                f"{self.sched.name}",
                fix="set model.optim.sched.name=WSD, or model.optim.sched.decay_steps=null",
            )
        if self.sched.decays and self.sched.lowest(self.lr) > self.lr:
            raise UserError(
                f"model.optim.sched.min_lr={self.sched.min_lr} is above model.optim.lr={self.lr}",
                fix="set model.optim.sched.min_lr to a tenth of model.optim.lr, or to 0",
            )


def learning_rate(step: int, *, peak: float, sched: SchedConfig, max_steps: int) -> float:
    """The learning rate of optimizer step ``step`` (from 0) out of ``max_steps``.

    Linear warm-up; then, unless the rate is constant, a decay from ``peak`` to ``min_lr`` and the last
    ``constant_steps`` at ``min_lr``. CosineAnnealing decays as half a cosine and WarmupAnnealing as a line, right from
    the warm-up on; WSD (Hu 2024, arXiv 2404.06395) stays at ``peak`` until its ``decay_steps`` begin. WarmupPolicy and
    WarmupHoldPolicy are NeMo's names of the constant rate.

    >>> sched = SchedConfig(warmup_steps=3, constant_steps=0, min_lr=0.0)
    >>> [round(learning_rate(s, peak=1.0, sched=sched, max_steps=7), 3) for s in range(7)]
    [0.25, 0.5, 0.75, 1.0, 0.854, 0.5, 0.146]
    """
    warmup, held, decay = sched.in_steps(max_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if not sched.decays:
        return peak
    end = max_steps - held
    low = sched.lowest(peak)
    if step >= end:
        return low
    match sched.name:
        case "CosineAnnealing":
            steps, style = end - warmup, "cosine"
        case "WarmupAnnealing":
            steps, style = end - warmup, "linear"
        case _:
            steps, style = max(1, min(decay, end - warmup)), sched.decay_style
    share = max(0.0, 1 - (end - step) / steps)
    return low + (peak - low) * _remaining(share, style)


def _remaining(share: float, style: str) -> float:
    """The remaining fraction between peak and end after ``share`` of the decay: 1 at 0, 0 at 1."""
    match style:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * share))
        case "minus_sqrt":  # Haegele 2024, arXiv 2405.18392
            return 1 - math.sqrt(share)
        case "exponential":
            return 2 * 0.5**share - 1
    return 1 - share
