# SPDX-License-Identifier: Apache-2.0
"""The modules that differ from Megatron's: norms that run without Transformer Engine, gated activations that keep
only their input for the backward, and RoPE per row."""

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
from nemo_aligner.parallel.cpu_speed import LocalProduct, embedded, gated, mark_added, rms_norm

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
            return F.rms_norm(x, self.shape, weight, self.eps) if x.is_cuda else rms_norm(x, weight, self.eps)
        return F.layer_norm(x, self.shape, weight, self.bias, self.eps)


class ColumnLinear(LocalProduct, ColumnParallelLinear):
    """Megatron's layer whose outputs are cut over tensor parallel ranks."""


class RowLinear(LocalProduct, RowParallelLinear):
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
            return embedded(input_, self.weight)
        return super().forward(input_)


def added_to_main_grad(weight: Tensor) -> Tensor:
    """``weight``, whose user returns its gradient, or returns None if it has added it to ``main_grad``."""
    return _AddedToMainGrad.apply(weight)


class _AddedToMainGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, weight: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Context, grad: Tensor | None) -> Tensor:
        return mark_added(ctx.weight) if grad is None else grad


class GatedActivation(nn.Module):
    """SwiGLU and its kin: the first half of x through the activation, times the second half.

    Shazeer 2020, arXiv 2002.05202.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.function = config.activation_func

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2 * ffn] -> [..., ffn]."""
        return gated(x, self.function)

    def sharded_state_dict(self, *_: object, **__: object) -> dict[str, Any]:
        """No weights. Megatron-core 0.16 asks every part of an MLP for them, by this name."""
        return {}


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
        """[B, heads, S, D] -> the same, contiguous: RoPE on the first ``size`` numbers (Su 2021, arXiv 2104.09864)."""
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
