# SPDX-License-Identifier: Apache-2.0
"""Megatron's transformer layer, whose last one leaves out what nobody reads."""

from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

__all__ = ["Layer"]


class Layer(TransformerLayer):
    """After the last layer's attention no position sees another: its MLP is computed for those that are read."""

    def forward(self, hidden_states: Tensor, **options: Any) -> tuple[Any, Tensor | None]:  # noqa: ANN401
        """[S, B, H] to the same; of the last layer to [n, 1, H] where ``RowParams.read`` has n places."""
        hidden, context = self._forward_attention(hidden_states, **options)
        rows = options["packed_seq_params"]
        if self.layer_number == self.config.num_layers and rows is not None and rows.read is not None:
            hidden = hidden.flatten(0, 1).index_select(0, rows.read)[:, None]
        return self._forward_mlp(hidden, padding_mask=options["padding_mask"]), context
