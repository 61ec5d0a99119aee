# SPDX-License-Identifier: Apache-2.0
"""The one bridge from an objective to Megatron's pipeline schedules. Knows stages and denominators; no algorithm."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from nemo_aligner.batch import TokenBatch
from nemo_aligner.models.gpt.head_projection import Projection, head_projection, select_positions
from nemo_aligner.models.gpt.model import GPT, InterleavedGPT
from nemo_aligner.objectives.protocol import Metrics, ModelOutput, Objective, Sums
from nemo_aligner.parallel import collectives, world


def forward_backward(
    model: GPT | InterleavedGPT,
    batches: Sequence[TokenBatch],
    objective: Objective,
    *,
    forward_only: bool,
    wrapped: Sequence[MegatronModule] | None = None,
    projection: Projection = Projection(),  # noqa: B008 - frozen
    outputs: list[ModelOutput] | None = None,
) -> Sums:
    """Forward, and unless ``forward_only`` backward, of one step's micro-batches through all pipeline stages.

    The loss of each micro-batch is a sum; it is divided by the count of the objective's unit over all micro-batches
    of all data parallel ranks, which the masks give before any forward.

    Args:
        wrapped: ``model``'s chunks inside Megatron's DDP; None where no gradients are summed.
        batches: this data parallel rank's micro-batches, as many as on every other rank; of one shape where there
            is more than one pipeline stage.
        outputs: filled on the last stage with each micro-batch's model output.

    Returns:
        {metric: (sum, count) over the global batch}, the same on every rank.
    """
    device, last, level = world.device(), model.chunks[-1], levelled(model, batches)
    total = torch.stack([batch.count(objective.unit) for batch in batches]).sum().to(device)
    total = collectives.sum_over_data_parallel(total)
    # Megatron divides by the number of micro-batches, its DDP by the number of data parallel ranks.
    scale = len(level) * world.dp_size() / total.clamp(min=1).item()
    if not forward_only and last.config.grad_scale_func is None:
        projection = replace(projection, loss_scale=scale / len(level))

    def loss_func(batch: TokenBatch, selected: Tensor | None, hidden: Tensor) -> tuple[Tensor, Metrics]:
        output = head_projection(last, hidden, batch, objective, projection, preselected=selected is not None)
        if outputs is not None and len(outputs) < len(batches):
            outputs.append(output)
        loss, metrics = objective(output, batch)
        return loss * scale, metrics

    def forward_step(iterator: Iterator[TokenBatch], module: MegatronModule) -> tuple[Tensor, partial]:
        batch = next(iterator).to(device)
        selected = select_positions(last, batch, objective) if world.is_last_stage() else None
        return module(**last.inputs(batch, selected)), partial(loss_func, batch, selected)

    collected = schedule(wrapped or model.chunks, level, forward_step, forward_only=forward_only)
    return _sums(collected[: len(batches)], objective.metrics)


def levelled(model: GPT | InterleavedGPT, batches: Sequence[TokenBatch]) -> list[TokenBatch]:
    """``batches`` and, for an interleaved schedule, which takes multiples of PP, as many without loss tokens."""
    missing = -len(batches) % world.pp_size() if len(model.chunks) > 1 else 0
    return [*batches, *[replace(batches[-1], loss_mask=torch.zeros_like(batches[-1].loss_mask))] * missing]


def schedule(
    chunks: Sequence[MegatronModule],
    batches: Sequence[TokenBatch],
    forward_step: Callable,
    *,
    forward_only: bool,
) -> list[Any]:
    """Drive Megatron's schedule for this layout; what the loss functions gave beside the loss, on the last stage."""
    shapes = {(batch.num_rows, batch.seq_length) for batch in batches}
    assert len(shapes) == 1 or world.pp_size() == 1, f"pipeline stages exchange one shape, not {shapes}"
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        # Each chunk reads the batches: the first for its tokens, the others for positions and boundaries.
        data_iterator=[iter(batches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=batches[0].seq_length,
        micro_batch_size=batches[0].num_rows,
        forward_only=forward_only,
    )


def _sums(collected: list[Metrics], names: tuple[str, ...]) -> Sums:
    sums = None
    if world.is_last_stage():
        sums = {
            name: torch.stack([torch.stack([x.double() for x in micro[name]]) for micro in collected]).sum(0)
            for name in names
        }
    return {
        name: (total[0].item(), total[1].item())
        for name, total in collectives.all_reduce_sums(sums, names).items()
    }
