# SPDX-License-Identifier: Apache-2.0
"""Megatron's distributed optimizer, from the ``model.optim`` block."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from nemo_aligner.models.gpt.adamw import replace_torch_adamw
from nemo_aligner.models.gpt.learning_rate import OptimConfig
from nemo_aligner.models.gpt.model import GPT
from nemo_aligner.parallel import collectives, cpu_shim
from nemo_aligner.parallel.shards import Shards, boxes


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
    if optim.overlap_grad_sync:
        # As Megatron's training loop sets them: sums begin at the last micro-batch, on all pipeline ranks at once.
        chunks[0].config.no_sync_func = _one_or_all([chunk.no_sync for chunk in wrapped])
        chunks[0].config.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in wrapped])
    return wrapped


def _one_or_all(functions: list[Callable]) -> Any:  # noqa: ANN401 - what Megatron's schedules take
    return functions[0] if len(functions) == 1 else functions


def build_optimizer(
    optim: OptimConfig, chunks: Sequence[DistributedDataParallel], *, dtype: torch.dtype, clip_grad: float
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
    _apply_settings(optim, built)
    return built


def _grad_norm(
    grads_for_norm: Sequence[Tensor],
    norm_type: float = 2,
    grad_stats_parallel_group: Any = None,  # noqa: ANN401
) -> float:
    """In the place of Megatron's, whose sums in fp32 make clipped gradients depend on the layout.

    Raises:
        _NotFinite: the norm is infinite or NaN; on every rank, and before Megatron has stepped.
    """
    assert norm_type == 2
    norm = collectives.norm_over_group(grads_for_norm, grad_stats_parallel_group)
    if not math.isfinite(norm):
        raise _NotFinite(norm)
    return norm


class _NotFinite(ArithmeticError):
    """The gradient's norm, its one argument, is infinite or NaN."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The result of an optimizer step."""

    done: bool  # else the weights and the moments are as they were
    grad_norm: float  # before clipping; NaN where fp16 has overflowed
    seeks_scale: bool = False  # fp16: not done, for the loss scale was too large and is lower now


def take_step(optimizer: MegatronOptimizer) -> StepResult:
    """Clip and step, unless the gradient's norm is not finite. The same on every rank."""
    stepped: Any
    try:
        stepped = optimizer.step()
    except _NotFinite as found:
        return StepResult(done=False, grad_norm=found.args[0])
    done, norm, _ = stepped
    if done:
        return StepResult(done=True, grad_norm=float(norm))
    # Below the least scale there is nothing to seek: the gradient itself is not finite.
    scale = float(optimizer.get_loss_scale())
    return StepResult(done=False, grad_norm=math.nan, seeks_scale=scale > optimizer.config.min_loss_scale)


def load_optimizer(optim: OptimConfig, optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Load what the optimizer's ``state_dict`` gave; ``optim`` counts, whatever the settings were then."""
    # megatron-core 0.19 finds a group by its learning rates, which may have changed since.
    rates = {name: value for name, value in optimizer.param_groups[0].items() if name in ("max_lr", "min_lr")}
    for group in state["optimizer"]["param_groups"]:
        group |= rates
    optimizer.load_state_dict(state)
    _apply_settings(optim, optimizer)


def _apply_settings(optim: OptimConfig, optimizer: MegatronOptimizer) -> None:
    """Put the settings into the optimizer's groups: they count, not those that its state was saved with."""
    for group in optimizer.param_groups:
        # Megatron leaves it to its own scheduler to apply wd_mult, which is 0 for biases and norms.
        group["weight_decay"] = optim.weight_decay * group["wd_mult"]
        group["betas"], group["eps"] = optim.betas, optim.eps
        # A state saved with another AdamW (torch's kernel, Transformer Engine's) lacks what this one reads besides.
        for name, value in inner_optimizer(optimizer).defaults.items():
            group.setdefault(name, value)


def inner_optimizer(optimizer: MegatronOptimizer) -> torch.optim.Optimizer:
    """The one within Megatron's, which holds the moments."""
    return _distributed(optimizer).optimizer


def _distributed(optimizer: MegatronOptimizer) -> DistributedOptimizer:
    # A model without experts has one.
    [one] = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    assert isinstance(one, DistributedOptimizer)
    return one


def make_moments(optimizer: MegatronOptimizer) -> None:
    """The moments that the first step would make, where there are none yet: zeros."""
    distributed = _distributed(optimizer)
    if not distributed.optimizer.state:
        distributed.load_state_dict(distributed.state_dict())  # which allocates them
        zero_moments(optimizer)


def zero_moments(optimizer: MegatronOptimizer) -> None:
    """Reset the optimizer's moments to those before the first step."""
    for moments in inner_optimizer(optimizer).state.values():
        for value in moments.values():
            if isinstance(value, Tensor):
                value.zero_()


def optimizer_shards(optimizer: MegatronOptimizer, model_state: ShardedStateDict) -> list[Shards]:
    """The optimizer's state of each weight: its fp32 copy and its moments, of which each rank has a part.

    They stand for the optimizer's own memory: nothing is gathered or copied, and what is written into them is loaded.

    Args:
        model_state: the model's, from which the weights get their names and places.
    """
    distributed = _distributed(optimizer)
    tensors, _ = extract_sharded_tensors_and_factories(model_state)
    stored_as = {tensor.data: tensor for tensor in nested_values(tensors)}
    found: dict[str, Shards] = {}
    for buffer in distributed.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for weight, ranges in bucket["param_map"].items():
                    kept = distributed._get_main_param_and_optimizer_states(weight)
                    for name in ("param", "exp_avg", "exp_avg_sq"):
                        for shards in _shards(
                            name, kept[name].view(-1), ranges["param"].start, stored_as[weight]
                        ):
                            # All layers, and both halves of a gated one, are stored under one name.
                            there = found.setdefault(shards.key, shards)
                            there.pieces.update(shards.pieces)
    return list(found.values())


def _shards(
    name: str, values: Tensor, start: int, weight: ShardedTensor | ShardedTensorFactory
) -> Iterator[Shards]:
    """``values``, which belong to a part of ``weight`` that begins at its ``start``-th number."""
    stored = weight.build() if isinstance(weight, ShardedTensorFactory) else [weight]
    whole_begin = 0  # of the stored tensor, among the weight's numbers
    for tensor in stored:
        assert isinstance(tensor, ShardedTensor) and isinstance(tensor.replica_id, tuple)
        num_extra = tensor.prepend_axis_num  # the layer, where those of all layers are stored as one
        first = max(start, whole_begin)
        pieces = {}
        for offsets, sizes in boxes(
            first - whole_begin,
            min(start + values.numel(), whole_begin + math.prod(tensor.local_shape)) - whole_begin,
            tensor.local_shape,
        ):
            place = [*tensor.global_offset[:num_extra]]
            place += [a + b for a, b in zip(tensor.global_offset[num_extra:], offsets, strict=True)]
            size = math.prod(sizes)
            pieces[torch.Size(place)] = values[first - start : first - start + size].view(
                *[1] * num_extra, *sizes
            )
            first += size
        yield Shards(
            key=f"optimizer.state.{name}.{tensor.key}",
            shape=torch.Size(tensor.global_shape),
            pieces=pieces,
            # The last of its numbers counts data parallel ranks, each of which has a part of its own.
            is_replica=any(tensor.replica_id[:-1]),
            may_differ=tensor.allow_shape_mismatch,
        )
        whole_begin += math.prod(tensor.local_shape)
