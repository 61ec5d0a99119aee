# SPDX-License-Identifier: Apache-2.0
"""Keys and values of past tokens in slots, each with a length of its own, and attention on them.

A slot grows by the tokens of a text or by one a step, and can take the first tokens of another slot. Knows no model.

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

    def begin_append(self, slots: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Make room: :meth:`append` is about to write so many tokens behind those of each slot.

        Returns:
            [b, S] int64, their positions; of padding on the right, the last one's.
        """
        starts = torch.tensor([self.lengths[slot] for slot in slots])
        width = max(counts)
        self._seen = int(starts.max()) + width
        self._reserve(self._seen)
        for slot, count in zip(slots, counts, strict=True):
            self.lengths[slot] += count
        self._slots = torch.tensor(slots, device=self.device)
        self._at = (starts[:, None] + torch.arange(width)).to(self.device)
        self._same_start = bool((starts == starts[0]).all())
        last = (starts + torch.tensor(counts) - 1).to(self.device)
        return self._at.minimum(last[:, None])

    def append(self, layer: int, qkv: Tensor) -> Tensor:
        """Write the tokens of :meth:`begin_append`, right padded; each attends to those before it in its slot.

        [b, S, G, R + 2, D] queries, key and value of each head group to [b, S, G * R * D].
        """
        query, key, value = (
            x.permute(0, 2, 3, 1, 4).flatten(1, 2) for x in qkv.split((qkv.shape[3] - 2, 1, 1), dim=3)
        )
        keys, values = self._keys[layer], self._values[layer]
        # Padding is written too; a slot's length hides it until its own tokens take its place.
        place = (self._slots[:, None], slice(None), self._at)
        keys[place], values[place] = key.transpose(1, 2), value.transpose(1, 2)
        if self._seen > qkv.shape[1]:
            key, value = (x[self._slots, :, : self._seen] for x in (keys, values))
        position = None if self._same_start else self._at
        out = attend(query, key, value, scale=self.scale, window=self.window, position=position)
        return out.transpose(1, 2).flatten(2)

    def copy(self, source: int, target: int, length: int) -> None:
        """Give ``target`` the first ``length`` tokens of ``source``, whatever it had."""
        for x in (*self._keys, *self._values):
            x[target, :, :length] = x[source, :, :length]
        self.lengths[target] = length

    def begin_step(self) -> Tensor:
        """Make room for one more token in every slot; [n] int64: its position."""
        longest = max(self.lengths) + 1
        self._reserve(longest)
        position = torch.tensor(self.lengths, device=self.device)
        slots, groups, capacity, _ = self._keys[0].shape
        heads = torch.arange(slots * groups, device=self.device)
        self._next = heads * capacity + position.repeat_interleave(groups)
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
            cached.view(-1, qkv.shape[-1]).index_copy_(0, self._next, new.reshape(-1, qkv.shape[-1]))
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

    def cut(self, slot: int, length: int) -> None:
        """Forget what is in ``slot`` beyond its first ``length`` tokens."""
        self.lengths[slot] = length

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
