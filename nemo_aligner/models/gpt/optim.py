# SPDX-License-Identifier: Apache-2.0
"""Megatron's distributed optimizer, from the ``model.optim`` block."""

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from nemo_aligner.models.gpt.adamw import replace_torch_adamw
from nemo_aligner.models.gpt.learning_rate import OptimConfig
from nemo_aligner.models.gpt.model import GPT
from nemo_aligner.parallel import cpu_shim

__all__ = ["build_optimizer", "wrap"]


def wrap(chunks: Sequence[GPT], optim: OptimConfig) -> list[DistributedDataParallel]:
    """Gradient buffers in fp32 around each chunk of the model, summed over the data parallel ranks."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=optim.overlap_grad_sync,
        overlap_param_gather=optim.overlap_param_sync,
    )
    return [
        # Buckets of later chunks are reduced at once, as Megatron's schedule has their gradients last.
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def build_optimizer(
    optim: OptimConfig,
    chunks: Sequence[DistributedDataParallel],
    *,
    dtype: torch.dtype,
    clip_grad: float,
) -> MegatronOptimizer:
    """AdamW whose state, with fp32 main copies where ``dtype`` is smaller, is dealt out over data parallel ranks."""
    replace_torch_adamw()
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
        use_distributed_optimizer=True,
        overlap_param_gather=optim.overlap_param_sync,
    )
    built = get_megatron_optimizer(config, list(chunks), use_gloo_process_groups=False)
    for group in built.param_groups:
        # Megatron leaves it to its own scheduler to apply wd_mult, which is 0 for biases and norms.
        group["weight_decay"] = optim.weight_decay * group["wd_mult"]
    return built
