# SPDX-License-Identifier: Apache-2.0
"""Megatron's optimizer and the learning-rate schedule, from the ``model.optim`` block."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import MegatronModule

from nemo_aligner.errors import UserError
from nemo_aligner.parallel import cpu_shim

__all__ = ["OptimConfig", "SchedConfig", "build_optimizer", "learning_rate"]

logger = logging.getLogger(__name__)


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


def build_optimizer(
    optim: OptimConfig, chunks: Sequence[MegatronModule], *, dtype: torch.dtype, clip_grad: float
) -> MegatronOptimizer:
    """AdamW over this rank's parameters, fp32 main copies where ``dtype`` is smaller."""
    cpu_shim.install()
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        clip_grad=clip_grad,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        params_dtype=dtype,
        use_distributed_optimizer=False,
    )
    built = get_megatron_optimizer(config, list(chunks), use_gloo_process_groups=False)
    for group in built.param_groups:
        # Megatron leaves it to its own scheduler to apply wd_mult, which is 0 for biases and norms.
        group["weight_decay"] = optim.weight_decay * group["wd_mult"]
        if "fused" in group:
            # torch's own AdamW (no Transformer Engine, no apex): one pass over memory, no temporary copies.
            group["foreach"], group["fused"] = False, True
    return built
