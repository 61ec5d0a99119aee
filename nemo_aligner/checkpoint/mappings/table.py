# SPDX-License-Identifier: Apache-2.0
"""The vocabulary that the mapping tables are written in: how a family's config keys and weights correspond
to ours.

A weight rule names one canonical tensor and the Hugging Face tensors it is made of; ``{i}`` stands for the
layer. Every ``join`` has its ``split``, and one undoes the other bit for bit. Knows no file format.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["DERIVED", "QKV", "REQUIRED", "Copy", "Dims", "Family", "GatedMLP", "Key", "Rule", "with_own"]

REQUIRED = object()
DERIVED = object()  # absent from config.json where it follows from the other sizes


@dataclass(frozen=True, kw_only=True)
class Dims:
    """The sizes that decide every tensor's shape."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocab: int
    labels: int = 1  # numbers that a reward model's head gives

    @property
    def query(self) -> int:
        """Rows of all query heads."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Rows of all key heads, and of all value heads."""
        return self.groups * self.head_dim


Shape = tuple[int, ...]


class Rule(Protocol):
    """One canonical weight; a linear layer's stands for its bias of as many rows too, where it has one."""

    @property
    def nemo(self) -> str:
        """The canonical name; a linear layer's lacks ".weight"."""
        ...

    @property
    def biased_by(self) -> tuple[str, ...]:
        """The keys of model_config.yaml any of which gives it a bias; empty where it is no linear layer."""
        ...

    def sources(self, dims: Dims) -> dict[str, Shape]:
        """The Hugging Face tensors, in order, with their shapes."""
        ...

    def shape(self, dims: Dims) -> Shape:
        """The canonical tensor's shape."""
        ...

    def join(self, parts: list[Tensor], dims: Dims) -> Tensor:
        """Hugging Face to canonical."""
        ...

    def split(self, tensor: Tensor, dims: Dims) -> list[Tensor]:
        """Canonical to Hugging Face."""
        ...


@dataclass(frozen=True)
class Copy:
    """The same tensor under two names; ``axes`` names the sizes of Dims."""

    nemo: str
    hf: str
    axes: tuple[str, ...]
    biased_by: tuple[str, ...] = ()

    def sources(self, dims: Dims) -> dict[str, Shape]:
        """See Rule."""
        return {self.hf: self.shape(dims)}

    def shape(self, dims: Dims) -> Shape:
        """See Rule."""
        return tuple(getattr(dims, axis) for axis in self.axes)

    def join(self, parts: list[Tensor], dims: Dims) -> Tensor:  # noqa: ARG002
        """See Rule."""
        return parts[0]

    def split(self, tensor: Tensor, dims: Dims) -> list[Tensor]:  # noqa: ARG002
        """See Rule."""
        return [tensor]


@dataclass(frozen=True)
class QKV:
    """The fused projection: for each query group its query heads, then its key head, then its value head."""

    nemo: str
    q: str
    k: str
    v: str
    biased_by: tuple[str, ...] = ("bias", "attention_bias", "qkv_bias")

    def sources(self, dims: Dims) -> dict[str, Shape]:
        """See Rule."""
        key = (dims.key, dims.hidden)
        return {self.q: (dims.query, dims.hidden), self.k: key, self.v: key}

    def shape(self, dims: Dims) -> Shape:
        """See Rule."""
        return (dims.query + 2 * dims.key, dims.hidden)

    def join(self, parts: list[Tensor], dims: Dims) -> Tensor:
        """See Rule."""
        per_group = [part.reshape(dims.groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(per_group, dim=1).flatten(0, 1)

    def split(self, tensor: Tensor, dims: Dims) -> list[Tensor]:
        """See Rule."""
        per_group = tensor.reshape(dims.groups, -1, *tensor.shape[1:])
        rows = [dims.query // dims.groups, dims.head_dim, dims.head_dim]
        return [part.flatten(0, 1) for part in per_group.split(rows, dim=1)]


@dataclass(frozen=True)
class GatedMLP:
    """The fused first layer of a gated MLP: the gate's rows, then the up projection's."""

    nemo: str
    gate: str
    up: str
    biased_by: tuple[str, ...] = ("bias", "mlp_bias")

    def sources(self, dims: Dims) -> dict[str, Shape]:
        """See Rule."""
        return dict.fromkeys((self.gate, self.up), (dims.ffn, dims.hidden))

    def shape(self, dims: Dims) -> Shape:
        """See Rule."""
        return (2 * dims.ffn, dims.hidden)

    def join(self, parts: list[Tensor], dims: Dims) -> Tensor:  # noqa: ARG002
        """See Rule."""
        return torch.cat(parts)

    def split(self, tensor: Tensor, dims: Dims) -> list[Tensor]:  # noqa: ARG002
        """See Rule."""
        return list(tensor.chunk(2))


@dataclass(frozen=True)
class Key:
    """A config key: its name in config.json, in model_config.yaml, and what transformers takes where it is
    absent.
    """

    hf: str
    nemo: str
    default: Any = REQUIRED


def with_own(keys: Iterable[Key], *own: Key) -> tuple[Key, ...]:
    """``keys`` with a family's own in place of those of the same name in config.json."""
    return (*(key for key in keys if key.hf not in {key.hf for key in own}), *own)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Everything that is particular to one Hugging Face architecture.

    Attributes:
        keys: what config.json and model_config.yaml both say.
        must_be: config.json's keys that change the computation, with the one value that is supported; None
            stands for their absence.
        bias_keys: which of config.json's attention_bias and mlp_bias switch biases on.
        rotary_share: the rotated share of each head where config.json has no partial_rotary_factor; None
            where the whole head is rotated in every model of the family.
        window_by_layer: whether config.json says of each layer if it has the sliding window.
        nemo: what is the same in every model of the family.
        head: the output layer, stored only where the embedding is not shared.
        rewards: whether these are reward models, whose head is always stored.
    """

    architecture: str
    model_type: str
    keys: tuple[Key, ...]
    must_be: dict[str, Any]
    bias_keys: tuple[str, ...] = ()
    rotary_share: float | None = None
    window_by_layer: bool = False
    nemo: dict[str, Any]
    outer: tuple[Rule, ...]
    layer: tuple[Rule, ...]
    head: Rule
    rewards: bool = False

    def with_reward_head(self) -> "Family":
        """The same models with a head that gives a few numbers."""
        return replace(
            self,
            architecture=self.architecture.replace("ForCausalLM", "ForSequenceClassification"),
            head=Copy("rm_head.weight", "score.weight", ("labels", "hidden")),
            rewards=True,
        )

    @property
    def free(self) -> set[str]:
        """The keys of model_config.yaml that config.json can express any value of."""
        optional = {
            "bias": len(self.bias_keys) == 2,
            **dict.fromkeys(self.bias_keys, True),
            "rotary_percentage": self.rotary_share is not None,
            "window_size": self.window_by_layer,
        }
        return {key.nemo for key in self.keys} | {name for name, free in optional.items() if free}
