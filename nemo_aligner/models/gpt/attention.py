# SPDX-License-Identifier: Apache-2.0
"""Attention on torch's scaled_dot_product_attention, in the place of Megatron's own core attention.

Causal, grouped queries, sliding windows, right padding and packed rows. Knows tensors of one layer; the batch
reaches it as :class:`RowParams`.

Shapes: S positions, B rows, H query heads and G key/value heads of this rank, D head size.
"""

import contextlib
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_aligner.models.gpt.layers import Rotation
from nemo_aligner.parallel.cpu_speed import BLOCK, SHORT, in_blocks


@dataclass
class RowParams(PackedSeqParams):
    """The row boundaries for attention. Megatron passes it through every layer unchanged."""

    # Not 'thd': Megatron then keeps [S, B, ...] shapes and applies RoPE by the per-row angles it is given.
    qkv_format: str = "sbhd"
    boundaries: tuple[int, ...] | None = None  # packed: where each sequence starts, and the end of the last
    selected: Tensor | None = None  # [n] places in [S * B] that are read of the model's output; None: all
    rotation: Rotation | None = None  # None: Megatron turns queries and keys, or positions are learned

    def bounds(self, length: int) -> list[int]:
        """Packed rows: where each sequence starts, and ``length``; a tail of padding counts as one more sequence."""
        assert self.boundaries is not None
        return [*self.boundaries, *([length] if self.boundaries[-1] < length else [])]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    window: int | None = None,
    dropout: float = 0.0,
    position: Tensor | None = None,
) -> Tensor:
    """Causal attention of S new positions among T >= S positions.

    query: [B, H, S, D]; key, value: [B, G, T, D]; position: [B, S] int64, None: the last S. Returns [B, H, S, D].
    """
    new, total = query.shape[2], key.shape[2]
    mask = None
    if position is not None:
        mask = _visible(position, total, window)[:, None]
    elif window is not None and window < total:
        mask = _visible(torch.arange(total - new, total, device=query.device), total, window)
    elif new != total:
        mask = _visible(torch.arange(total - new, total, device=query.device), total, None)
    exact = query.device.type == "cpu" and query.dtype in (torch.float32, torch.float64)
    if exact and mask is None and dropout == 0.0 and BLOCK < total <= SHORT:
        return in_blocks(query, key, value, scale)
    return _sdpa(query, key, value, mask=mask, scale=scale, dropout=dropout)


def _visible(position: Tensor, total: int, window: int | None) -> Tensor:
    """[..., S] positions -> [..., S, total] bool: which keys each query sees."""
    keys = torch.arange(total, device=position.device)
    visible = keys <= position[..., None]
    if window is not None:
        visible &= keys > position[..., None] - window
    return visible


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, scale: float, dropout: float
) -> Tensor:
    if key.shape[1] != query.shape[1]:
        # An expanded copy of the small key and value beats SDPA's own grouped path, which leaves its fast kernel.
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, dropout_p=dropout
    )


class SDPACoreAttention(MegatronModule):
    """Core attention for Megatron's SelfAttention: [S, B, H, D] queries to [S, B, H * D] context."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **others: object,  # of Megatron: of context parallel ranks and their groups
    ) -> None:
        super().__init__(config=config)
        assert (attention_type, attn_mask_type) == ("self", AttnMaskType.causal)
        no_cp = others.get("cp_comm_type") is None or config.context_parallel_size == 1
        assert no_cp, "keys and values are not gathered over CP"
        self.layer_number = layer_number
        assert config.kv_channels is not None
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        self.window = config.window_size[0] + 1 if config.window_size is not None else None
        self.dropout = config.attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: RowParams | None = None,
    ) -> Tensor:
        """[S, B, H, D] query, [S, B, G, D] key and value to [S, B, H * D]."""
        assert attention_mask is None and attention_bias is None, "the rows say what is visible"
        del attn_mask_type
        rows = packed_seq_params or RowParams()
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if rows.rotation is not None:
            q, k = rows.rotation.turn(q), rows.rotation.turn(k)
        drops = self.training and self.dropout > 0
        tracker = tensor_parallel.get_cuda_rng_tracker()
        assert tracker is not None, "the world is not started"
        with tracker.fork() if drops else contextlib.nullcontext():
            out = self._dispatch(q, k, v, rows)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _dispatch(self, q: Tensor, k: Tensor, v: Tensor, rows: RowParams) -> Tensor:
        options = {
            "scale": self.scale,
            "window": self.window,
            "dropout": self.dropout if self.training else 0.0,
        }
        if rows.boundaries is None:
            return attend(q, k, v, **options)
        # Each packed sequence on its own: no neighbour is ever seen, and no S x S mask is made.
        parts = [
            attend(q[:, :, start:end], k[:, :, start:end], v[:, :, start:end], **options)
            for start, end in itertools.pairwise(rows.bounds(q.shape[2]))
        ]
        return torch.cat(parts, dim=2)
