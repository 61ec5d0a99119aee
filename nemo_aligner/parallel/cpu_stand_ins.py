# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for CUDA's streams, generators and collectives on a CPU: the replacements of the tables in
:mod:`~nemo_aligner.parallel.cpu_shim`."""

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class Stream:
    """Work on a CPU is done in order: waiting for a stream or an event is waiting for nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def _nothing(self, *_: object) -> None:
        pass

    wait_stream = wait_event = synchronize = record = wait = _nothing

    def query(self) -> bool:
        """All work is done."""
        return True

    def record_event(self, *_: object) -> "Stream":
        """An event of the stream: itself."""
        return self


def nothing(*_: object, **__: object) -> None:
    """Do nothing: a CPU has no queue, no cache and no counters."""


def get_rng_state(*_: object, **__: object) -> torch.Tensor:
    """The CPU's generator is the device's."""
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, *_: object, **__: object) -> None:
    """See :func:`get_rng_state`."""
    torch.set_rng_state(state)


def manual_seed(seed: int) -> None:
    """Seed the CPU's generator."""
    # torch.manual_seed would call back into torch.cuda.manual_seed.
    torch.random.default_generator.manual_seed(seed)


def all_gather(
    output: torch.Tensor, shard: torch.Tensor, *, group: dist.ProcessGroup, async_op: bool
) -> None:
    """Gather unless the group is one rank, whose shard is the output."""
    if group.size() > 1:
        dist.all_gather_into_tensor(output, shard, group=group, async_op=async_op)


def reduce_scatter(
    shard: torch.Tensor,
    whole: torch.Tensor,
    *,
    op: dist.ReduceOp.RedOpType,
    group: dist.ProcessGroup,
    async_op: bool,
) -> None:
    """Reduce unless the group is one rank, whose shard is the whole."""
    if group.size() > 1:
        dist.reduce_scatter_tensor(shard, whole, op=op, group=group, async_op=async_op)


def coalescing_manager(group: dist.ProcessGroup, *, async_ops: bool) -> contextlib.AbstractContextManager:
    """As torch's, and one that can be waited for where nothing is called within it."""
    if group.size() > 1:
        return dist.distributed_c10d._coalescing_manager(group, async_ops=async_ops)
    return contextlib.nullcontext(Stream())


def scale(_: int, __: torch.Tensor, tensors: Sequence[Sequence[torch.Tensor]], factor: float) -> None:
    """Multiply in place: (sources, targets), which are the same tensors."""
    for source, target in zip(*tensors, strict=True):
        torch.mul(source, factor, out=target)


class _TypeName(str):
    """``tensor.type()``: 'torch.FloatTensor', which here also equals 'torch.cuda.FloatTensor'."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and str.__eq__(self, other.replace("torch.cuda.", "torch.", 1))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


_type_of = torch.Tensor.type


def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> object:  # noqa: ANN401 - handed on
    """As ``Tensor.type``; a name equals that of the same type on CUDA."""
    name = _type_of(self, *args, **kwargs)
    return _TypeName(name) if isinstance(name, str) else name


class NoRngWarning(logging.Filter):
    """Megatron warns when CPU draws happen inside its device RNG context; here the two are one generator."""

    def filter(self, record: logging.LogRecord) -> bool:
        """See logging.Filter."""
        return "CPU RNG state changed" not in record.getMessage()
