# SPDX-License-Identifier: Apache-2.0
"""The modules that differ from Megatron's: norms that run without Transformer Engine, and RoPE per row."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_aligner.models.gpt.config import GPTConfig

__all__ = ["Norm", "RowRotary"]


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
            return F.rms_norm(x, self.shape, weight, self.eps)
        return F.layer_norm(x, self.shape, weight, self.bias, self.eps)


class RowRotary(nn.Module):
    """Rotary angles by each token's own position, so that packed and cached rows are right."""

    def __init__(self, config: GPTConfig, device: torch.device) -> None:
        super().__init__()
        # As transformers rounds: half of the rotated size, made even.
        size = int(config.head_dim * config.rotary_percentage) // 2 * 2
        inv_freq = 1.0 / (config.rotary_base ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
        self.inv_freq = (config.rope_scaling.apply(inv_freq) if config.rope_scaling else inv_freq).to(device)

    def forward(self, positions: Tensor) -> Tensor:
        """[B, S] int64 positions -> [S, B, 1, D] float32 angles, as Megatron's apply_rotary_pos_emb takes them."""
        angles = positions.t()[:, :, None, None].float() * self.inv_freq
        return torch.cat((angles, angles), dim=-1)
