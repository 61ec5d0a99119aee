# SPDX-License-Identifier: Apache-2.0
"""The modules that differ from Megatron's: norms that run without Transformer Engine, gated activations that keep
only their input for the backward, and RoPE per row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.rope import inverse_frequencies, rotation_scale
from nemo_aligner.parallel import world
from nemo_aligner.parallel.vocab import product

__all__ = [
    "ColumnLinear",
    "GatedActivation",
    "InputEmbedding",
    "Norm",
    "Rotation",
    "RowLinear",
    "RowRotary",
    "may_be_added",
]

Context: TypeAlias = Any  # torch puts any attribute on an autograd context


class Norm(nn.Module):
    """RMSNorm, LayerNorm, or LayerNorm whose stored weight is the deviation from 1 (layernorm1p)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.shape, self.eps = (hidden_size,), eps
        self.rms = config.normalization == "RMSNorm"
        self.zero_centered = config.layernorm_zero_centered_gamma
        fill = 0.0 if self.zero_centered else 1.0
        self.weight = nn.Parameter(torch.full(self.shape, fill, dtype=config.params_dtype))
        self.bias = None if self.rms else nn.Parameter(torch.zeros(self.shape, dtype=config.params_dtype))
        for parameter in self.parameters():
            # Under sequence parallelism each rank sees some positions only: Megatron sums these gradients over TP.
            setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - torch types no such name

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        weight = self.weight + 1 if self.zero_centered else self.weight
        if self.rms:
            # torch has a fused kernel for CUDA only.
            return (
                F.rms_norm(x, self.shape, weight, self.eps)
                if x.is_cuda
                else _RMSNorm.apply(x, weight, self.eps)
            )
        return F.layer_norm(x, self.shape, weight, self.bias, self.eps)


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight (Zhang and Sennrich 2019), in fp32 at least; keeps x and 1 / rms(x) for the backward.

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


class _Product(torch.autograd.Function):
    """x @ weight.T by :func:`~nemo_aligner.parallel.vocab.product`, where torch takes its one library for CPUs."""

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


class _LocalProduct:
    """Of a linear layer that no other rank shares: nothing is sent."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:  # noqa: ANN401 - Megatron's
        shared = options["allreduce_dgrad"] or options["sequence_parallel"]
        if input.is_cuda or shared or options["bias"] is not None:
            return super()._forward_impl(input, weight, **options)  # pyright: ignore[reportAttributeAccessIssue]
        return _Product.apply(input, weight)


class ColumnLinear(_LocalProduct, ColumnParallelLinear):
    """Megatron's layer whose outputs are cut over tensor parallel ranks."""


class RowLinear(_LocalProduct, RowParallelLinear):
    """Megatron's layer whose inputs are cut over tensor parallel ranks."""


class InputEmbedding(VocabParallelEmbedding):
    """Megatron's, of a weight that is not the head's too: its gradient is formed where DDP gathers it.

    Torch would make a [V, H] tensor of zeros, add a few rows to it, and have DDP add all of it.
    """

    def forward(self, input_: Tensor) -> Tensor:
        """[B, S] tokens to [B, S, H], or what sequence parallelism makes of them."""
        alone = world.tp_size() == 1 and not self.reduce_scatter_embeddings
        trains = torch.is_grad_enabled() and hasattr(self.weight, "main_grad")
        if alone and trains and not input_.is_cuda:
            return _Embedded.apply(input_, self.weight)
        return super().forward(input_)


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
        return None, _added(ctx.weight)


def _added(weight: Tensor) -> Tensor:
    """As Megatron's own layers tell DDP that a gradient is in its buffer: its hook wants one, and adds none."""
    setattr(weight, "grad_added_to_main_grad", True)  # noqa: B010 - torch types no such name
    return torch.empty_like(weight)


def may_be_added(weight: Tensor) -> Tensor:
    """``weight``, whose user either gives it a gradient or, giving None, has put it where DDP gathers it."""
    return _MayBeAdded.apply(weight)


class _MayBeAdded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, weight: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Context, grad: Tensor | None) -> Tensor:
        return _added(ctx.weight) if grad is None else grad


class GatedActivation(nn.Module):
    """SwiGLU and its kin (Shazeer 2020): the first half of x through the activation, times the second half."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.function = config.activation_func

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2 * ffn] -> [..., ffn]."""
        return _Gated.apply(x, self.function)

    def sharded_state_dict(self, *_: object, **__: object) -> dict[str, Any]:
        """No weights. Megatron-core 0.16 asks every part of an MLP for them, by this name."""
        return {}


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


class RowRotary(nn.Module):
    """Rotary angles by each token's own position, so that packed and cached rows are right."""

    def __init__(self, config: GPTConfig, device: torch.device) -> None:
        super().__init__()
        self.inv_freq = inverse_frequencies(config).to(device)
        self.scale = rotation_scale(config)  # of cosines and sines

    def forward(self, positions: Tensor) -> Tensor:
        """[B, S] int64 positions -> [S, B, 1, D] float32 angles, as Megatron's apply_rotary_pos_emb takes them."""
        angles = positions.t()[:, :, None, None].float() * self.inv_freq
        return torch.cat((angles, angles), dim=-1)


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of rotary angles, made once for all layers: [B, 1, S, size / 2], in the dtype of the model."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, angles: Tensor, dtype: torch.dtype, *, scale: float = 1.0) -> "Rotation":
        """From what :class:`RowRotary` gives, and its scale."""
        half = angles[..., : angles.shape[-1] // 2].permute(1, 2, 0, 3)
        return cls(*((x * scale).to(dtype).contiguous() for x in (half.cos(), half.sin())))

    def turn(self, x: Tensor) -> Tensor:
        """[B, heads, S, D] -> the same, contiguous: RoPE on the first ``size`` numbers (Su et al. 2021)."""
        return _Turned.apply(x, self.cos, self.sin)

    def turn_positions_first(self, x: Tensor) -> Tensor:
        """[S, B, heads, D] -> the same, as :meth:`turn`."""
        return _Turned.apply(x, self.cos.permute(2, 0, 1, 3), self.sin.permute(2, 0, 1, 3))


class _Turned(torch.autograd.Function):
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin); its gradient is turned back. Keeps nothing of x.

    The transpose, which a scale of cosines and sines leaves one.
    """

    @staticmethod
    def forward(ctx: Context, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    first, second = x[..., :half], x[..., half : 2 * half]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    out[..., 2 * half :] = x[..., 2 * half :]
    return out
