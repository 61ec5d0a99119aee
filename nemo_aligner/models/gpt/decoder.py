# SPDX-License-Identifier: Apache-2.0
"""The forward of a GPT for writing: the model's own weights, without what only training needs.

Megatron's layers spend more time on their way to the products of one token than on the products. A decoder reads a
model's weights when it is made, so it is made anew after they have changed. Knows slots and pipeline stages, no text.

Shapes: N tokens, H hidden size, G key/value heads of this rank, R query heads to each, D head size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_aligner.models.gpt.kv_cache import KVCache
from nemo_aligner.models.gpt.model import GPT, InterleavedGPT, weights_in_effect
from nemo_aligner.models.gpt.sampling import MASKED_LOGIT
from nemo_aligner.parallel import collectives, world
from nemo_aligner.parallel.cpu_speed import PackedLinear

Attend = Callable[[int, Tensor], Tensor]

READ_TOKENS = 4096  # of texts that are read at once, padding and all: what bounds the memory of activations


def _linear(module: nn.Module, *, rows: int) -> PackedLinear:
    own = weights_in_effect(module)
    return PackedLinear(own["weight"], own.get("bias"), rows=rows)


class _RowLinear:
    """A linear layer whose input is cut over tensor parallel ranks: their parts are summed, then the bias is added."""

    def __init__(self, module: nn.Module, *, rows: int) -> None:
        self.linear = _linear(module, rows=rows)
        self.bias = None
        if world.tp_size() > 1:
            self.bias, self.linear.bias = self.linear.bias, None

    def __call__(self, x: Tensor) -> Tensor:
        out = collectives.sum_over_tensor_parallel(self.linear(x))
        return out if self.bias is None else out.add_(self.bias)


class _Norm:
    """RMSNorm or LayerNorm, of our modules' and of Transformer Engine's weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None, config: Any) -> None:  # noqa: ANN401 - Megatron's
        self.weight = weight + 1 if config.layernorm_zero_centered_gamma else weight
        self.bias = bias
        self.rms, self.eps = config.normalization == "RMSNorm", config.layernorm_epsilon
        self.by_hand = self.rms and weight.device.type == "cpu"
        self.eps_tensor = torch.tensor(self.eps)

    def __call__(self, x: Tensor) -> Tensor:
        if not self.rms:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        if not self.by_hand:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        wide = x if x.dtype == torch.float64 else x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.addcmul(self.eps_tensor, norm, norm, value=1 / x.shape[-1]).rsqrt_()
        return (wide * scale).mul_(self.weight).to(x.dtype)


class _Layer:
    """One transformer layer: attention and MLP, each on a norm of what it is added to."""

    def __init__(self, layer: Any, number: int, *, rows: int) -> None:  # noqa: ANN401 - Megatron's
        attention, mlp, config = layer.self_attention, layer.mlp, layer.config
        self.number = number
        self.groups, self.head_dim = attention.num_query_groups_per_partition, config.kv_channels
        self.norm = _input_norm(layer.input_layernorm, attention.linear_qkv, config)
        self.qkv = PackedLinear(*_own_qkv(attention.linear_qkv, config), rows=rows)
        self.proj = _RowLinear(attention.linear_proj, rows=rows)
        self.mlp_norm = _input_norm(layer.pre_mlp_layernorm, mlp.linear_fc1, config)
        self.fc1 = _linear(mlp.linear_fc1, rows=rows)
        self.fc2 = _RowLinear(mlp.linear_fc2, rows=rows)
        self.head_norms = (
            tuple(_norm(norm, config) for norm in (attention.q_layernorm, attention.k_layernorm))
            if config.qk_layernorm
            else None
        )
        self.gated, self.activation = config.gated_linear_unit, config.activation_func

    def __call__(self, x: Tensor, angles: "_Angles | None", attend: Attend) -> Tensor:
        """[N, H] -> [N, H]."""
        qkv = self.qkv(self.norm(x)).view(x.shape[0], self.groups, -1, self.head_dim)
        if self.head_norms is not None:
            for part, norm in zip((qkv[:, :, :-2], qkv[:, :, -2]), self.head_norms, strict=True):
                part.copy_(norm(part))
        if angles is not None:
            angles.turn_(qkv[:, :, :-1])
        x = self.proj(attend(self.number, qkv)).add_(x)
        inner = self.fc1(self.mlp_norm(x))
        if self.gated:
            gate, up = inner.chunk(2, dim=-1)
            inner = self.activation(gate).mul_(up)
        else:
            inner = self.activation(inner)
        return self.fc2(inner).add_(x)


def _own_qkv(linear: Any, config: Any) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401 - Megatron's
    """Weight and bias of this rank's queries and of the key and value that they see.

    Where there are fewer keys than ranks, Megatron cuts a group of heads without regard to its parts, and gathers
    activations; here each rank gathers, once, the rows that are its own.
    """
    fused = weights_in_effect(linear)
    weight, bias, copies = fused["weight"], fused.get("bias"), world.tp_size() // config.num_query_groups
    if copies <= 1:
        return weight, bias
    each = config.num_attention_heads // world.tp_size()
    group, part = divmod(world.tp_rank(), copies)

    def own(columns: Tensor) -> Tensor:
        rows = collectives.gather_over_tensor_parallel(columns).t()
        heads = rows.unflatten(0, (config.num_query_groups, -1, config.kv_channels))[group]
        return torch.cat((heads[part * each : (part + 1) * each], heads[-2:])).flatten(0, 1)

    return own(weight.t()), None if bias is None else own(bias[None])[:, 0]


def _norm(module: Any, config: Any) -> _Norm:  # noqa: ANN401 - ours or Transformer Engine's
    own = weights_in_effect(module)
    return _Norm(own["weight"], own.get("bias"), config)


def _input_norm(module: Any, linear: Any, config: Any) -> _Norm:  # noqa: ANN401 - Megatron's
    """The norm before a linear layer, of which Transformer Engine makes one module."""
    fused = weights_in_effect(linear)
    if "layer_norm_weight" in fused:
        return _Norm(fused["layer_norm_weight"], fused.get("layer_norm_bias"), config)
    return _norm(module, config)


@dataclass
class _Angles:
    """Rotary embedding of N positions: cosines and sines [N, 1, 1, size], the first half of the sines negated."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, model: GPT, positions: Tensor) -> "_Angles | None":
        if model.gpt_config.position_embedding_type != "rope":
            return None
        rotary, dtype = model.rotary_pos_emb, model.config.params_dtype
        angles = rotary(positions[:, None])[0, :, :, None]
        cos, sin = angles.cos().mul_(rotary.scale), angles.sin().mul_(rotary.scale)
        sin[..., : sin.shape[-1] // 2].neg_()
        return cls(cos.to(dtype), sin.to(dtype))

    def turn_(self, x: Tensor) -> None:
        """[N, G, heads, D] in place: x cos + (second half negated, first half) sin, on the first ``size`` numbers."""
        x = x[..., : self.cos.shape[-1]]
        torch.addcmul(x * self.cos, x.roll(x.shape[-1] // 2, -1), self.sin, out=x)


def _runs(lengths: Sequence[int]) -> Iterator[slice]:
    """Runs of rows that have READ_TOKENS at most, padding and all; or are one row.

    >>> list(_runs([READ_TOKENS // 3, READ_TOKENS // 2, 9, 5000, 9]))
    [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None), slice(4, 5, None)]
    """
    start = longest = 0
    for row, length in enumerate(lengths):
        if row > start and (row + 1 - start) * max(longest, length) > READ_TOKENS:
            yield slice(start, row)
            start, longest = row, 0
        longest = max(longest, length)
    yield slice(start, len(lengths))


class Decoder:
    """This rank's part of a model, ready to write in ``slots`` rows at once.

    Args:
        model: whose weights are read now; on a CPU they are copied, where ``packs``.
        packs: worth its copy where many tokens are to be written.
    """

    def __init__(self, model: GPT | InterleavedGPT, *, slots: int, packs: bool) -> None:
        self.chunks = model.chunks
        rows = slots if packs else 0
        config, gpt = model.config, model.gpt_config
        count, self.config = 0, config
        self.layers: list[list[_Layer]] = []
        for chunk in self.chunks:
            self.layers.append(
                [_Layer(layer, count + i, rows=rows) for i, layer in enumerate(chunk.decoder.layers)]
            )
            count += len(self.layers[-1])
        if self.chunks[0].pre_process:
            self.embedding = weights_in_effect(self.chunks[0].embedding)
        last = self.chunks[-1]
        self.writes = last.post_process
        if self.writes:
            weight: Tensor | None = last.output_layer.weight
            if last.share_embeddings_and_output_weights:
                weight = last.shared_embedding_or_output_weight()
            assert weight is not None
            self.head = PackedLinear(weight.detach(), None, rows=rows)
            self.final_norm = _norm(last.decoder.final_layernorm, config)
            self.first_id = world.tp_rank() * weight.shape[0]
            self.real_ids = max(0, min(weight.shape[0], gpt.vocab_size - self.first_id))
        self.cache = KVCache(
            slots=slots,
            layers=count,
            groups=max(1, gpt.query_groups // world.tp_size()),
            head_dim=gpt.head_dim,
            window=gpt.window_size,
            dtype=config.params_dtype,
            device=world.device(),
        )

    def append(self, slots: Sequence[int], texts: Sequence[Sequence[int]]) -> Tensor | None:
        """Put tokens behind those that ``slots`` hold; READ_TOKENS at once, a longer text in chunks.

        Returns:
            [b, H] on the last pipeline stage: the hidden states from which their next tokens are predicted.
        """
        found: list[Tensor | None] = []
        for rows in _runs([len(text) for text in texts]):
            hidden = None
            for start in range(0, max(len(text) for text in texts[rows]), READ_TOKENS):
                chunks = [text[start : start + READ_TOKENS] for text in texts[rows]]
                hidden = self._append(slots[rows], chunks)
            found.append(hidden)
        return torch.cat([hidden for hidden in found if hidden is not None]) if self.writes else None

    def _append(self, slots: Sequence[int], texts: Sequence[Sequence[int]]) -> Tensor | None:
        lengths = [len(text) for text in texts]
        b, length = len(texts), max(lengths)
        tokens = torch.zeros(b, length, dtype=torch.int64)
        for row, text in enumerate(texts):
            tokens[row, : len(text)] = torch.tensor(text)
        positions = self.cache.begin_append(slots, lengths)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            return self.cache.append(layer, qkv.unflatten(0, (b, length))).flatten(0, 1)

        hidden = self._forward(tokens.to(world.device()).reshape(-1), positions.reshape(-1), attend)
        if hidden is None:
            return None
        ends = torch.tensor([row * length + n - 1 for row, n in enumerate(lengths)], device=hidden.device)
        return self.final_norm(hidden[ends])

    def step(self, tokens: Tensor, alive: Sequence[bool]) -> Tensor | None:
        """Append to each slot its token of ``tokens`` [n], which it keeps if it is ``alive``.

        Returns as :meth:`append` does, of all slots.
        """
        positions = self.cache.begin_step()
        hidden = self._forward(tokens, positions, self.cache.step)
        self.cache.end_step(alive)
        return None if hidden is None else self.final_norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V / TP] float, padding dropped; this rank's first column is ``first_id``."""
        z = self.head(hidden)
        z = z if z.dtype == torch.float64 else z.float()
        z[:, self.real_ids :] = MASKED_LOGIT
        return z

    @property
    def vocab_width(self) -> int:
        """Columns of :meth:`logits`."""
        return self.head.weight.shape[0]

    def column(self, tokens: Tensor) -> Tensor:
        """The columns of ``tokens`` in this rank's logits; ``vocab_width`` for those that are other ranks'."""
        local = tokens - self.first_id
        return local.where((local >= 0) & (local < self.vocab_width), self.vocab_width)

    def _forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor | None:
        """[N] tokens and positions to [N, H] before the final norm, on the last stage; None on the others."""
        angles = _Angles.of(self.chunks[0], positions)
        for chunk, layers in zip(self.chunks, self.layers, strict=True):
            if chunk.pre_process:
                x = self._embed(chunk, tokens, positions)
            else:
                shape = (tokens.shape[0], chunk.config.hidden_size)
                x = collectives.from_previous_stage(shape, chunk.config.params_dtype)
            for layer in layers:
                x = layer(x, angles, attend)
            if chunk.post_process:
                return x
            collectives.to_next_stage(x)
        return None

    def _embed(self, chunk: GPT, tokens: Tensor, positions: Tensor) -> Tensor:
        weight = self.embedding["word_embeddings.weight"]
        local = tokens - world.tp_rank() * weight.shape[0]
        if world.tp_size() == 1:
            x = weight[local]
        else:
            owned = (local >= 0) & (local < weight.shape[0])
            x = collectives.sum_over_tensor_parallel(weight[local.where(owned, 0)] * owned[:, None])
        if chunk.gpt_config.position_embedding_type == "learned_absolute":
            x = x + self.embedding["position_embeddings.weight"][positions]
        return x
