# SPDX-License-Identifier: Apache-2.0
"""Keys and values of past tokens in slots, each with a length of its own, and attention on them.

A slot is filled by a prompt, grows by a token a step, and is filled again by another prompt. Knows no model.

Shapes: n slots, G key/value heads of this rank, R query heads to each, D head size, T tokens of the longest slot.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_aligner.models.gpt.attention import attend

__all__ = ["KVCache"]

GROWTH = 64  # tokens; capacity is a multiple of it


class KVCache:
    """One tensor per layer, [n * G, capacity, 2 D]: key and value side by side. Grows as its longest slot does."""

    def __init__(  # noqa: PLR0913 - sizes
        self,
        *,
        slots: int,
        layers: int,
        groups: int,
        head_dim: int,
        scale: float,
        window: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.lengths = [0] * slots  # tokens of each slot that are in the cache
        self.groups, self.head_dim, self.scale, self.window = groups, head_dim, scale, window
        self._capacity = 0
        self._layers = [torch.zeros(slots * groups, 0, 2 * head_dim, dtype=dtype, device=device)] * layers

    def fill(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Forget what is in ``slots``: :meth:`prefill` is about to write so many tokens into each."""
        self._reserve(max(lengths))
        for slot, length in zip(slots, lengths, strict=True):
            self.lengths[slot] = length
        device = self._layers[0].device
        heads = torch.arange(self.groups, device=device)
        self._rows = (torch.tensor(slots, device=device)[:, None] * self.groups + heads).reshape(-1)

    def prefill(self, layer: int, qkv: Tensor) -> Tensor:
        """Causal attention of whole prompts, right padded, which are written into the slots of :meth:`fill`.

        [b, S, G, R + 2, D] queries, key and value of each head group to [b, S, G * R * D].
        """
        b, length, groups, width, size = qkv.shape
        # Padding is written too; a slot's length hides it until its own tokens take its place.
        pairs = qkv[:, :, :, -2:].permute(0, 2, 1, 3, 4).reshape(b * groups, length, 2 * size)
        self._layers[layer][self._rows, :length] = pairs
        query = qkv[:, :, :, :-2].permute(0, 2, 3, 1, 4).reshape(b, groups * (width - 2), length, size)
        key, value = pairs.view(b, groups, length, 2 * size).split(size, dim=-1)
        out = attend(query, key, value, scale=self.scale, window=self.window)
        return out.transpose(1, 2).reshape(b, length, -1)

    def begin_step(self) -> Tensor:
        """Make room for one more token in every slot; [n] int64: its position."""
        longest = max(self.lengths) + 1
        self._reserve(longest)
        layer = self._layers[0]
        position = torch.tensor(self.lengths, device=layer.device)
        rows = torch.arange(layer.shape[0], device=layer.device)
        self._at = rows * self._capacity + position.repeat_interleave(self.groups)
        keys = torch.arange(longest, device=layer.device)
        hidden = keys > position[:, None]
        if self.window is not None:
            hidden |= keys <= position[:, None] - self.window
        self._bias = torch.zeros(hidden.shape, dtype=layer.dtype, device=layer.device)
        self._bias.masked_fill_(hidden, -torch.inf)
        # On a CPU products by hand beat torch's attention of few queries, and they lose nothing in fp32.
        self._by_hand = layer.device.type == "cpu" and layer.dtype in (torch.float32, torch.float64)
        if self._by_hand:
            self._bias = self._bias.repeat_interleave(self.groups, 0)
        return position

    def step(self, layer: int, qkv: Tensor) -> Tensor:
        """Write each slot's new token and attend to all of its tokens: [n, G, R + 2, D] to [n, G * R * D]."""
        n, groups, width, size = qkv.shape
        cached = self._layers[layer]
        # A step that a slot does not take is written over by its next one.
        cached.view(-1, 2 * size).index_copy_(0, self._at, qkv[:, :, -2:].reshape(n * groups, 2 * size))
        key, value = cached[:, : self._bias.shape[-1]].split(size, dim=-1)
        query = qkv[:, :, :-2].reshape(n * groups, width - 2, size)
        if self._by_hand:
            scores = torch.baddbmm(self._bias[:, None], query, key.transpose(1, 2), alpha=self.scale)
            return torch.bmm(scores.softmax(-1), value).view(n, -1)
        # The queries of a group as if they were positions: they see the same keys.
        query, key, value = (x.unflatten(0, (n, groups)) for x in (query, key, value))
        mask = self._bias[:, None, None]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)
        return out.reshape(n, -1)

    def end_step(self, alive: Sequence[bool]) -> None:
        """The slots that are ``alive`` keep the token of the step."""
        self.lengths = [length + here for length, here in zip(self.lengths, alive, strict=True)]

    def keep(self, slots: Sequence[int]) -> None:
        """Drop all other slots; those kept are numbered anew, in this order."""
        self.lengths = [self.lengths[slot] for slot in slots]
        index = torch.tensor(slots, device=self._layers[0].device)
        for number, layer in enumerate(self._layers):
            kept = layer.unflatten(0, (-1, self.groups)).index_select(0, index)
            self._layers[number] = kept.flatten(0, 1)

    def _reserve(self, length: int) -> None:
        if length <= self._capacity:
            return
        # By half as much again, so that what is copied stays in proportion to what is written.
        self._capacity = -(-max(length, self._capacity * 3 // 2) // GROWTH) * GROWTH
        for number, layer in enumerate(self._layers):
            # Zeros: what is masked must not be NaN.
            grown = layer.new_zeros(layer.shape[0], self._capacity, layer.shape[2])
            grown[:, : layer.shape[1]] = layer
            self._layers[number] = grown
