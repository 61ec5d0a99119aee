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
from nemo_aligner.parallel.cpu_speed import Bags, zeros

GROWTH = 64  # tokens; capacity is a multiple of it


class KVCache:
    """Two tensors per layer, [n, G, capacity, D] each. They grow as the longest slot does."""

    def __init__(
        self,
        *,
        slots: int,
        layers: int,
        groups: int,
        head_dim: int,
        window: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.lengths = [0] * slots  # tokens of each slot that are in the cache
        self.scale, self.window, self.device = head_dim**-0.5, window, device
        empty = torch.zeros(slots, groups, 0, head_dim, dtype=dtype, device=device)
        self._keys, self._values = [empty] * layers, [empty] * layers

    @property
    def capacity(self) -> int:
        """Tokens for which each slot has room."""
        return self._keys[0].shape[2]

    def fill(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Forget what is in ``slots``: :meth:`prefill` is about to write so many tokens into each."""
        self._reserve(max(lengths))
        for slot, length in zip(slots, lengths, strict=True):
            self.lengths[slot] = length
        self._filled = torch.tensor(slots, device=self.device)

    def prefill(self, layer: int, qkv: Tensor) -> Tensor:
        """Causal attention of whole prompts, right padded, which are written into the slots of :meth:`fill`.

        [b, S, G, R + 2, D] queries, key and value of each head group to [b, S, G * R * D].
        """
        length = qkv.shape[1]
        query, key, value = (
            x.permute(0, 2, 3, 1, 4).flatten(1, 2) for x in qkv.split((qkv.shape[3] - 2, 1, 1), dim=3)
        )
        # Padding is written too; a slot's length hides it until its own tokens take its place.
        self._keys[layer][self._filled, :, :length] = key
        self._values[layer][self._filled, :, :length] = value
        out = attend(query, key, value, scale=self.scale, window=self.window)
        return out.transpose(1, 2).flatten(2)

    def begin_step(self) -> Tensor:
        """Make room for one more token in every slot; [n] int64: its position."""
        longest = max(self.lengths) + 1
        self._reserve(longest)
        position = torch.tensor(self.lengths, device=self.device)
        slots, groups, capacity, _ = self._keys[0].shape
        heads = torch.arange(slots * groups, device=self.device)
        self._at = heads * capacity + position.repeat_interleave(groups)
        keys = torch.arange(longest, device=self.device)
        hidden = keys > position[:, None]
        if self.window is not None:
            hidden |= keys <= position[:, None] - self.window
        self._mask = self._keys[0].new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None, None]
        self._bags: Bags | None = None
        return position

    def step(self, layer: int, qkv: Tensor) -> Tensor:
        """Write each slot's new token and attend to all of its tokens: [n, G, R + 2, D] to [n, G * R * D]."""
        query, new_key, new_value = qkv.split((qkv.shape[2] - 2, 1, 1), dim=2)
        keys, values = self._keys[layer], self._values[layer]
        for cached, new in ((keys, new_key), (values, new_value)):
            # A step that a slot does not take is written over by its next one.
            cached.view(-1, qkv.shape[-1]).index_copy_(0, self._at, new.reshape(-1, qkv.shape[-1]))
        # The queries of a group as if they were positions: they see the same keys, which then need no copies.
        if keys.device.type == "cpu" and keys.dtype == torch.float32:
            if self._bags is None:
                self._bags = Bags(keys, query.shape[2], self._mask)
            out = self._bags.attend(query, keys, values, scale=self.scale)
        else:
            seen = (x[:, :, : self._mask.shape[-1]] for x in (keys, values))
            out = F.scaled_dot_product_attention(query, *seen, attn_mask=self._mask, scale=self.scale)
        return out.reshape(qkv.shape[0], -1)

    def end_step(self, alive: Sequence[bool]) -> None:
        """The slots that are ``alive`` keep the token of the step."""
        self.lengths = [length + here for length, here in zip(self.lengths, alive, strict=True)]

    def free(self, slot: int) -> None:
        """Forget the sequence in ``slot``: its length no longer counts."""
        self.lengths[slot] = 0

    def keep(self, slots: Sequence[int]) -> None:
        """Drop all other slots; those kept are numbered anew, in this order."""
        self.lengths = [self.lengths[slot] for slot in slots]
        index = torch.tensor(slots, device=self.device)
        for tensors in (self._keys, self._values):
            tensors[:] = [x.index_select(0, index) for x in tensors]

    def _reserve(self, length: int) -> None:
        if length <= self.capacity:
            return
        # By half as much again, so that what is copied stays in proportion to what is written.
        capacity = -(-max(length, self.capacity * 3 // 2) // GROWTH) * GROWTH
        for tensors in (self._keys, self._values):
            for layer, x in enumerate(tensors):
                # Zeros: what is masked must not be NaN.
                grown = zeros((*x.shape[:2], capacity, x.shape[3]), x.dtype, self.device)
                grown[:, :, : x.shape[2]] = x
                tensors[layer] = grown
