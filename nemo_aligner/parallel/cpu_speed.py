# SPDX-License-Identifier: Apache-2.0
"""Code that is only for speed on a CPU. Everything else computes the same by torch's or Megatron's own means.

The gain is torch's time over ours on one AVX-512 core, in fp32 and at the sizes of a model of 360M parameters; `make
bench` shows what all of it together gives.

============ ======================================================================= ==========
what         why                                                                     gain
============ ======================================================================= ==========
product      oneDNN, where torch takes MKL, which is slow on CPUs other than Intel's 1.6 to 2.2
rms_norm     torch has a fused kernel for CUDA only                                  1.8
gated        keeps x alone, and forms the gradient in its memory                     memory
embedded     adds a few rows where DDP gathers them; torch adds all of [V, H]        60
in_blocks    torch's kernel computes the upper half of short squares too             1.7
Bags         torch's kernel packs keys for many queries; here there are few          1.3 to 2
PackedLinear a copy of a weight in oneDNN's order for a few rows                     2.5
zeros        huge pages: attention reads a cache on small ones slower                1.2
============ ======================================================================= ==========

Knows no layer and no model.
"""

import contextlib
import functools
import math
import mmap
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Context: TypeAlias = Any  # torch puts any attribute on an autograd context

# Rows of one chunk of logits, of which caches then hold common vocabularies; fewer would cost products their speed.
CPU_ROWS = 128
# oneDNN keeps 0.6 MB of code for each shape that it meets, so its products have multiples of so many rows: the first up
# to a chunk's, the second beyond.
ONEDNN_ROWS, ONEDNN_MANY_ROWS = 8, 1024
# Queries of a block; tokens up to which torch's kernel computes whole squares.
BLOCK, SHORT = 64, 512
HUGE_BYTES = 4 << 20  # from here on a tensor lies on huge pages, of 2 MiB each


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T: [n, k], [m, k] -> [n, m]."""
    fp32_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    few_shapes = x.shape[0] % (ONEDNN_ROWS if x.shape[0] <= CPU_ROWS else ONEDNN_MANY_ROWS) == 0
    if fp32_cpu and few_shapes and x.shape[0] > 0 and x.shape[1] > 0 and torch.backends.mkldnn.is_available():
        # torch.mm goes to MKL, which is slow on processors that are not Intel's.
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return x @ weight.t()


class _Product(torch.autograd.Function):
    """x @ weight.T by :func:`product`, where torch takes its one library for CPUs."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x.flatten(0, -2), weight).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        grad_weight = grad.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return product(grad, weight.t()).view(x.shape), grad_weight


class LocalProduct:
    """Of a linear layer that no other rank shares: nothing is sent."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:  # noqa: ANN401 - Megatron's
        shared = options["allreduce_dgrad"] or options["sequence_parallel"]
        if input.is_cuda or shared or options["bias"] is not None:
            return super()._forward_impl(input, weight, **options)  # pyright: ignore[reportAttributeAccessIssue]
        return _Product.apply(input, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., H], [H] -> [..., H]: x / rms(x) * weight (Zhang and Sennrich 2019, arXiv 1910.07467), in fp32 at least."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps x and 1 / rms(x) for the backward.

    With n = x / rms(x) and g = grad * weight: dL/dx = (g - n * mean(g * n)) / rms(x), dL/dweight = sum(grad * n).
    """

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale  # in scale's dtype, as all that follows
        towards = grad * normed
        grad_weight = towards.flatten(0, -2).sum(0)
        mean = (towards @ weight.to(towards.dtype)).div_(x.shape[-1])
        grad_x = (grad * weight).to(normed.dtype).sub_(normed.mul_(mean[..., None])).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def embedded(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of a weight whose gradient is added where DDP gathers it, without a [V, H] tensor of zeros on the way."""
    return _Embedded.apply(tokens, weight)


class _Embedded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight = weight
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[None, Tensor]:
        (tokens,) = ctx.saved_tensors
        gathered = ctx.weight.main_grad
        gathered.index_add_(0, tokens.flatten(), grad.flatten(0, -2).to(gathered.dtype))
        return None, mark_added(ctx.weight)


def mark_added(weight: Tensor) -> Tensor:
    """Mark a gradient as being in DDP's buffer, as Megatron's layers do: DDP's hook wants one, and adds none."""
    setattr(weight, "grad_added_to_main_grad", True)  # noqa: B010 - torch types no such name
    return torch.empty_like(weight)


def gated(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """[..., 2 * ffn] -> [..., ffn]: the first half of x through the activation, times the second half."""
    return _Gated.apply(x, function)


class _Gated(torch.autograd.Function):
    """Keeps x alone for the backward, which computes the activation again: a small part of the layer's time.

    x is the output of a linear layer, which nobody else reads: a backward may form its gradient in x's memory.
    """

    @staticmethod
    def forward(ctx: Context, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        gate, up = x.chunk(2, dim=-1)
        return function(gate).mul_(up)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        if ctx.function is F.silu:
            # What is newly taken costs a CPU a page fault for every 4 KiB.
            active = F.silu(gate).mul_(grad)
            torch.ops.aten.silu_backward.grad_input(up.mul_(grad), gate, grad_input=gate)
            up.copy_(active)
            return x, None
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            active = ctx.function(gate)
        torch.mul(grad, active.detach(), out=grad_up)
        grad_gate.copy_(torch.autograd.grad(active, gate, grad * up)[0])
        return grad_x, None


def in_blocks(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of [B, H, S, D] queries on [B, G, S, D] keys and values: [B, H, S, D]."""
    return _InBlocks.apply(query, key, value, scale)


class _InBlocks(torch.autograd.Function):
    """Causal attention, each block of queries against the keys up to its end: little more than half of the square.

    With a = softmax(scale * q k^T), o = a v and g = dL/do: dL/dv = a^T g, and with s = a * (g v^T - sum(a * g v^T)),
    dL/dq = scale * s k and dL/dk = scale * s^T q.
    """

    @staticmethod
    def forward(ctx: Context, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        rows, heads, length, size = query.shape
        each = heads // key.shape[1]  # query heads of a key's
        keys, values = key.reshape(-1, length, size), value.reshape(-1, length, size)
        # In the order in which the output projection reads it.
        out = query.new_empty(length, rows, heads, size).permute(1, 2, 0, 3)
        kept = []
        for start, end in _blocks(length):
            part = (query[:, :, start:end] * scale).reshape(len(keys), -1, size)
            scores = torch.bmm(part, keys[:, :end].transpose(1, 2))
            scores.view(len(keys), each, end - start, end)[..., start:] += _above_diagonal(query.dtype)[
                : end - start, : end - start
            ]
            torch.softmax(scores, -1, out=scores)
            out[:, :, start:end] = torch.bmm(scores, values[:, :end]).view(rows, heads, -1, size)
            if any(ctx.needs_input_grad):
                kept += [part, scores]
        ctx.save_for_backward(keys, values, *kept)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        keys, values, *kept = ctx.saved_tensors
        rows, heads, length, size = grad.shape
        grad_query = torch.empty(grad.shape, dtype=grad.dtype)
        grad_keys = grad_values = torch.empty(0)
        # From the last block, which has all keys: what it gives is what the others are added to.
        for block, (start, end) in reversed(list(enumerate(_blocks(length)))):
            part, weights = kept[2 * block : 2 * block + 2]
            towards = grad[:, :, start:end].reshape(len(keys), -1, size)
            to_values = torch.bmm(weights.transpose(1, 2), towards)
            scores = torch.bmm(towards, values[:, :end].transpose(1, 2))
            torch.ops.aten._softmax_backward_data.out(scores, weights, -1, scores.dtype, grad_input=scores)
            to_query = torch.bmm(scores, keys[:, :end]).view(rows, heads, -1, size)
            torch.mul(to_query, ctx.scale, out=grad_query[:, :, start:end])
            to_keys = torch.bmm(scores.transpose(1, 2), part)
            if end == length:
                grad_keys, grad_values = to_keys, to_values
            else:
                grad_keys[:, :end] += to_keys
                grad_values[:, :end] += to_values
        shape = (rows, -1, length, size)
        return grad_query, grad_keys.view(shape), grad_values.view(shape), None


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


@functools.cache
def _above_diagonal(dtype: torch.dtype) -> Tensor:
    return torch.full((BLOCK, BLOCK), -torch.inf, dtype=dtype).triu_(1)


class Bags:
    """Attention of a few queries on fp32 keys and values [n, G, capacity, D], the last of which are hidden by a mask.

    The weighted sum of values is that of a bag of embeddings, whose rows are read once and in order.
    """

    def __init__(self, keys: Tensor, each: int, mask: Tensor) -> None:
        """``each``: queries of a key's; ``mask``: [n, 1, 1, T] to be added to the scores."""
        (slots, groups, self.capacity, self.size), longest = keys.shape, mask.shape[-1]
        heads = torch.arange(slots * groups).repeat_interleave(each)
        self.each, self.longest = each, longest
        self.index = (heads[:, None] * self.capacity + torch.arange(longest)).view(-1)
        self.mask = mask[:, :, 0].expand(-1, groups, -1).reshape(-1, 1, longest)
        self.starts = torch.arange(heads.numel()) * longest

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, *, scale: float) -> Tensor:
        """[n, G, R, D] queries to [n * G * R, D]."""
        seen = keys.view(-1, self.capacity, self.size)[:, : self.longest].transpose(1, 2)
        scores = torch.baddbmm(self.mask, query.reshape(-1, self.each, self.size), seen, alpha=scale)
        weights = scores.softmax(-1).view(-1)
        rows = values.view(-1, self.size)
        return torch.embedding_bag(rows, self.index, self.starts, per_sample_weights=weights)[0]


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros, on Linux on huge pages where it is large: attention reads small ones a fifth slower."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or sys.platform != "linux" or size < HUGE_BYTES:
        return torch.zeros(*shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel that was built without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


def _packs(dtype: torch.dtype) -> bool:
    """True if oneDNN has products of the type here: its bfloat16 takes AVX-512, or AVX-NE-CONVERT."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class PackedLinear:
    """x @ weight.T + bias for up to ``rows`` rows, with a copy of the weight in the order in which oneDNN reads it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, rows: int) -> None:
        self.weight, self.bias, self.rows, self.packed = weight, bias, rows, None
        if rows > 1 and weight.numel() > 0 and weight.device.type == "cpu" and _packs(weight.dtype):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)

    def __call__(self, x: Tensor) -> Tensor:
        """[n, k] -> [n, m]."""
        if self.packed is not None and 0 < x.shape[0] <= self.rows:
            padded = F.pad(x, (0, 0, 0, -x.shape[0] % ONEDNN_ROWS))
            out = torch.ops.mkldnn._linear_pointwise(padded, self.packed, self.bias, "none", [], "")
            return out[: x.shape[0]]
        out = product(x, self.weight)
        return out if self.bias is None else out.add_(self.bias)
