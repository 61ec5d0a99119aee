# SPDX-License-Identifier: Apache-2.0
"""Megatron's optimizer, from the ``model.optim`` block."""

from collections.abc import Sequence

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import MegatronModule

from nemo_aligner.models.gpt.learning_rate import OptimConfig
from nemo_aligner.parallel import cpu_shim

__all__ = ["build_optimizer"]


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
