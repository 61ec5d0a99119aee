# SPDX-License-Identifier: Apache-2.0
"""Megatron's distributed optimizer, from the ``model.optim`` block."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer import optimizer as megatron_optimizer
from torch import Tensor

from nemo_aligner.models.gpt.adamw import replace_torch_adamw
from nemo_aligner.models.gpt.learning_rate import OptimConfig
from nemo_aligner.models.gpt.model import GPT
from nemo_aligner.parallel import collectives, cpu_shim

__all__ = ["apply_settings", "build_optimizer", "inner_optimizers", "wrap"]


def wrap(chunks: Sequence[GPT], optim: OptimConfig) -> list[DistributedDataParallel]:
    """Gradient buffers in fp32 around each chunk of the model, summed over the data parallel ranks."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=optim.overlap_grad_sync,
        overlap_param_gather=optim.overlap_param_sync,
        bucket_size=max(1, int(optim.bucket_cap_mb * 2**20 / 4)),
    )
    wrapped = [
        # Chunks after the first are one bucket each: their gradients are summed while the first one's are computed.
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        _count_padding(chunk)
    if optim.overlap_grad_sync:
        # As Megatron's training loop sets them: sums begin at the last micro-batch, on all pipeline ranks at once.
        chunks[0].config.no_sync_func = _one_or_all([chunk.no_sync for chunk in wrapped])
        chunks[0].config.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in wrapped])
    return wrapped


def _count_padding(chunk: Any) -> None:  # noqa: ANN401 - the buffers of Megatron's DDP are not those of a Module
    """Take padding for part of the buckets.

    When Megatron 0.16 gathers the optimizer's state to be saved, it places buckets end to end without their padding,
    and reads each parameter at its offset among the padded ones: with several buckets it saves the wrong numbers.
    """
    for buffer in chunk.buffers:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()


def _one_or_all(functions: list[Callable]) -> Any:  # noqa: ANN401 - what Megatron's schedules take
    return functions[0] if len(functions) == 1 else functions


def build_optimizer(
    optim: OptimConfig,
    chunks: Sequence[DistributedDataParallel],
    *,
    dtype: torch.dtype,
    clip_grad: float,
) -> MegatronOptimizer:
    """AdamW whose state, with fp32 main copies where ``dtype`` is smaller, is dealt out over data parallel ranks."""
    replace_torch_adamw()
    megatron_optimizer.get_grad_norm_fp32 = _grad_norm
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
    apply_settings(optim, built)
    return built


def _grad_norm(
    grads_for_norm: Sequence[Tensor],
    norm_type: float = 2,
    grad_stats_parallel_group: Any = None,  # noqa: ANN401
) -> float:
    """In the place of Megatron's, whose sums in fp32 make clipped gradients depend on the layout."""
    assert norm_type == 2
    return collectives.norm_over_group(grads_for_norm, grad_stats_parallel_group)


def apply_settings(optim: OptimConfig, optimizer: MegatronOptimizer) -> None:
    """Put the settings into the optimizer's groups: they count, not those that its state was saved with."""
    for group in optimizer.param_groups:
        # Megatron leaves it to its own scheduler to apply wd_mult, which is 0 for biases and norms.
        group["weight_decay"] = optim.weight_decay * group["wd_mult"]
        group["betas"], group["eps"] = optim.betas, optim.eps


def inner_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """torch's optimizers within Megatron's."""
    chained = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [one.optimizer for one in chained]
