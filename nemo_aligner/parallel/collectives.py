# SPDX-License-Identifier: Apache-2.0
"""Sums and broadcasts that trainers and the engine need, by what they are for; each is a no-op on one rank."""

import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nemo_aligner.errors import UserError
from nemo_aligner.parallel import world

K = TypeVar("K")
T = TypeVar("T")

NORM_BLOCK = 512  # numbers whose squares are summed in their own dtype


def sum_over_data_parallel(x: Tensor) -> Tensor:
    """The sum of ``x`` over the data parallel ranks, in place; whole rows, so without context parallel ranks."""
    if world.dp_size() > 1:
        dist.all_reduce(x, group=parallel_state.get_data_parallel_group())
    return x


def sum_over_tensor_parallel(x: Tensor) -> Tensor:
    """The sum of ``x`` over the tensor parallel ranks, in place."""
    if world.tp_size() > 1:
        dist.all_reduce(x, group=parallel_state.get_tensor_model_parallel_group())
    return x


def max_over_tensor_parallel(x: Tensor) -> Tensor:
    """The maximum of ``x`` over the tensor parallel ranks, in place."""
    if world.tp_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=parallel_state.get_tensor_model_parallel_group())
    return x


def gather_over_tensor_parallel(x: Tensor) -> Tensor:
    """[n, K] -> [n, TP * K]: each rank's columns side by side, in rank order."""
    if world.tp_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world.tp_size())]
    dist.all_gather(parts, x.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=-1)


def all_reduce_max(values: Sequence[float]) -> list[float]:
    """The largest of each of ``values`` over all ranks."""
    if world.world_size() == 1:
        return list(values)
    x = torch.tensor(values, dtype=torch.float64, device=world.device())
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x.tolist()


def norm_over_group(tensors: Sequence[Tensor], group: Any) -> float:  # noqa: ANN401 - torch's ProcessGroup
    """The 2-norm of what the ranks of ``group`` hold, each number once.

    Squares are summed in float64 but for the few of a block: how numbers are dealt out to ranks and tensors then moves
    the norm far less than fp32 can show.
    """
    squares = torch.zeros((), dtype=torch.float64, device=world.device())
    for x in tensors:
        # A float64 copy of a whole embedding would cost a CPU more time than all the rest of the optimizer.
        flat = x.reshape(-1)
        in_blocks = flat.numel() // NORM_BLOCK * NORM_BLOCK
        blocks = torch.linalg.vector_norm(flat[:in_blocks].view(-1, NORM_BLOCK), dim=1)
        squares += blocks.double().square().sum() + flat[in_blocks:].double().square().sum()
    dist.all_reduce(squares, group=group)
    return squares.sqrt().item()


def all_reduce_sums(sums: dict[str, Tensor] | None, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Sum the last stage's metrics over data parallel ranks and give them to every stage.

    Args:
        sums: {name: [2] float64 (sum, count)} on the last pipeline stage; None on the others.
        names: of all metrics, in one order known to every rank.
    """
    table = torch.zeros(len(names), 2, dtype=torch.float64, device=world.device())
    if sums is not None:
        for row, name in enumerate(names):
            table[row] = sums[name]
        sum_over_data_parallel(table)
    table = broadcast_from_last_stage(table, tuple(table.shape), dtype=torch.float64)
    return dict(zip(names, table.cpu().unbind(0), strict=True))


def broadcast_from_last_stage(
    x: Tensor | None, shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The last pipeline stage's ``x`` (of ``shape``, made ``dtype``) on every stage; the others give None."""
    if world.pp_size() > 1:
        options = {"dtype": dtype, "device": world.device()}
        x = torch.empty(shape, **options) if x is None else x.to(**options).contiguous()
        group: Any = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(x, parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    assert x is not None
    return x


def to_next_stage(x: Tensor) -> None:
    """Hand ``x`` to the next pipeline stage; the last one's next is the first."""
    group: Any = parallel_state.get_pipeline_model_parallel_group()
    dist.send(x.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank(), group=group)


def from_previous_stage(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor that the previous pipeline stage sends by :func:`to_next_stage`."""
    x = torch.empty(shape, dtype=dtype, device=world.device())
    group: Any = parallel_state.get_pipeline_model_parallel_group()
    dist.recv(x, parallel_state.get_pipeline_model_parallel_prev_rank(), group=group)
    return x


def broadcast_object(value: T) -> T:
    """Rank 0's ``value``, on every rank."""
    if world.world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=world.device())
    return box[0]


def from_first_of_model(work: Callable[[], T]) -> T:
    """The result of ``work`` on the first rank of each of the model's copies, on every rank of that copy."""
    if world.tp_size() * world.pp_size() == 1:
        return work()
    group: Any = parallel_state.get_model_parallel_group()
    box = [work() if world.is_first_of_model() else None]
    dist.broadcast_object_list(box, group=group, group_src=0, device=world.device())
    return box[0]  # type: ignore[return-value]


def from_rank_0(work: Callable[[], T]) -> T:
    """The result of ``work`` on rank 0, or its UserError, on every rank; the others wait for as long as it takes."""
    found: T | UserError | None = None
    with world.at_own_pace():
        if world.is_logging_rank():
            try:
                found = work()
            except UserError as error:
                found = error
    found = broadcast_object(found)
    if isinstance(found, UserError):
        raise found
    return found  # type: ignore[return-value] - rank 0's


def all_gather_objects_dp(value: T) -> list[T]:
    """The ``value`` of each data parallel rank, in their order."""
    if world.dp_size() == 1:
        return [value]
    found: list[T] = [None] * world.dp_size()  # type: ignore[list-item]
    dist.all_gather_object(found, value, group=parallel_state.get_data_parallel_group())
    return found


def merged_over_data_parallel(found: dict[K, T]) -> dict[K, T]:
    """The items of all data parallel ranks' dictionaries, which share no key."""
    return {key: value for part in all_gather_objects_dp(found) for key, value in part.items()}


def of_all_ranks(value: T) -> list[T]:
    """The ``value`` of each rank, in their order."""
    if world.world_size() == 1:
        return [value]
    found: list[T] = [None] * world.world_size()  # type: ignore[list-item]
    dist.all_gather_object(found, value)
    return found


def from_node_leader(value: T) -> T:
    """The ``value`` of the rank that :func:`world.is_node_leader` names on this rank's node."""
    gathered = of_all_ranks((socket.gethostname(), world.is_node_leader(), value))
    return next(v for host, leads, v in gathered if leads and host == socket.gethostname())
