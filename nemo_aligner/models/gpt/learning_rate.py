# SPDX-License-Identifier: Apache-2.0
"""The ``model.optim`` block and the learning rate that it makes of a step's number. Pure; imports no torch."""

import math
from dataclasses import dataclass, field
from typing import Literal

from nemo_aligner.errors import UserError

__all__ = ["OptimConfig", "SchedConfig", "learning_rate"]


@dataclass(frozen=True, kw_only=True)
class SchedConfig:
    """The ``model.optim.sched`` block."""

    name: Literal["CosineAnnealing", "constant"] = "CosineAnnealing"
    warmup_steps: int = 10  # steps of linear growth from lr / (warmup_steps + 1)
    constant_steps: int = 1000  # last steps, held at min_lr
    min_lr: float = 9e-7  # where the cosine ends


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The ``model.optim`` block."""

    name: Literal["distributed_fused_adam", "fused_adam", "adam", "adamw"] = "distributed_fused_adam"
    lr: float = 3e-5  # peak learning rate
    weight_decay: float = 0.01  # decoupled, on matrices only
    betas: tuple[float, float] = (0.9, 0.98)  # decay of Adam's two moments
    eps: float = 1e-8  # added to Adam's denominator
    overlap_grad_sync: bool = False  # sum gradients over data parallel ranks while the backward goes on
    overlap_param_sync: bool = False  # gather weights while the next forward goes on
    sched: SchedConfig = field(default_factory=SchedConfig)

    def check(self) -> None:
        """Refuse what would train nothing or the wrong way."""
        if self.lr <= 0:
            raise UserError(
                f"model.optim.lr={self.lr} is not positive", cure="set model.optim.lr, for instance to 5e-6"
            )
        if self.sched.name == "CosineAnnealing" and self.sched.min_lr > self.lr:
            raise UserError(
                f"model.optim.sched.min_lr={self.sched.min_lr} is above model.optim.lr={self.lr}",
                cure="set model.optim.sched.min_lr to a tenth of model.optim.lr, or to 0",
            )


def learning_rate(step: int, *, peak: float, sched: SchedConfig, max_steps: int) -> float:
    """The learning rate of optimizer step ``step`` (from 0) out of ``max_steps``.

    Linear warm-up, a half cosine from ``peak`` to ``min_lr``, then ``constant_steps`` at ``min_lr``.

    >>> sched = SchedConfig(warmup_steps=3, constant_steps=0, min_lr=0.0)
    >>> [round(learning_rate(s, peak=1.0, sched=sched, max_steps=7), 3) for s in range(7)]
    [0.25, 0.5, 0.75, 1.0, 0.854, 0.5, 0.146]
    """
    if step < sched.warmup_steps:
        return peak * (step + 1) / (sched.warmup_steps + 1)
    if sched.name == "constant":
        return peak
    decay_steps = max_steps - sched.warmup_steps - sched.constant_steps
    done = step - sched.warmup_steps
    if done >= decay_steps:
        return sched.min_lr
    return sched.min_lr + (peak - sched.min_lr) * 0.5 * (1 + math.cos(math.pi * done / decay_steps))
