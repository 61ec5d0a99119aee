# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine's attention. Imported only where TE is."""

import itertools
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_aligner.models.gpt.attention import RowParams, SDPACoreAttention


class TECoreAttention(SDPACoreAttention):
    """Transformer Engine's fused kernels on padded and packed rows."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        **others: Any,  # noqa: ANN401 - Megatron's
    ) -> None:
        super().__init__(config, layer_number, attn_mask_type, attention_type, **others)
        self.fused = TEDotProductAttention(config, layer_number, attn_mask_type, attention_type)

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
        rows = packed_seq_params or RowParams()
        assert attention_mask is None and attention_bias is None, "the rows say what is visible"
        if rows.rotation is not None:
            query, key = (rows.rotation.turn_positions_first(x) for x in (query, key))
        if rows.boundaries is None:
            return self.fused(query, key, value, None, AttnMaskType.causal)
        del attn_mask_type
        bounds = rows.bounds(query.shape[0])
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=query.device)
        longest = max(end - start for start, end in itertools.pairwise(bounds))
        params = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        tokens = (x.squeeze(1) for x in (query, key, value))
        out = self.fused(*tokens, None, AttnMaskType.padding_causal, packed_seq_params=params)
        return out.reshape(query.shape[0], 1, -1)
