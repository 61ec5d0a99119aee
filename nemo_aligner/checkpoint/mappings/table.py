# SPDX-License-Identifier: Apache-2.0
"""The vocabulary that the mapping tables are written in: how a family's config keys and weights correspond
to ours.

A weight rule names one canonical tensor and the Hugging Face tensors it is made of, those of a layer by their names
within it. Knows no file format, and no torch: settings are checked before that is loaded.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

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


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One canonical tensor, and the Hugging Face tensors whose rows it is made of.

    A linear layer's rule stands for its bias of as many rows too, where the model has one.

    Attributes:
        nemo: the canonical name; a linear layer's lacks ".weight".
        sources: the Hugging Face tensors in order, each with the sizes of Dims that are its axes.
        by_group: whether each query group has its rows of every source together; else a source's rows stay together.
        biased_by: the keys of model_config.yaml any of which gives it a bias; empty where it is no linear layer.
    """

    nemo: str
    sources: Mapping[str, tuple[str, ...]]
    by_group: bool = False
    biased_by: tuple[str, ...] = ()

    @property
    def is_vocabulary(self) -> bool:
        """True if its rows are tokens."""
        return next(iter(self.sources.values()))[0] == "vocab"


def copy(nemo: str, hf: str, axes: tuple[str, ...], biased_by: tuple[str, ...] = ()) -> Rule:
    """The same tensor under two names."""
    return Rule(nemo=nemo, sources={hf: axes}, biased_by=biased_by)


def qkv(nemo: str, *, q: str, k: str, v: str) -> Rule:
    """The fused projection: for each query group its query heads, then its key head, then its value head."""
    sources = {q: ("query", "hidden"), k: ("key", "hidden"), v: ("key", "hidden")}
    return Rule(nemo=nemo, sources=sources, by_group=True, biased_by=("bias", "attention_bias", "qkv_bias"))


def gated_mlp(nemo: str, *, gate: str, up: str) -> Rule:
    """The fused first layer of a gated MLP: the gate's rows, then the up projection's."""
    sources = dict.fromkeys((gate, up), ("ffn", "hidden"))
    return Rule(nemo=nemo, sources=sources, biased_by=("bias", "mlp_bias"))


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
            head=copy("rm_head.weight", "score.weight", ("labels", "hidden")),
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
