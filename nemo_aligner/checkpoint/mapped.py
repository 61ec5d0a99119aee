# SPDX-License-Identifier: Apache-2.0
"""Weights under Hugging Face's names, read and cut by their canonical ones, as the tables in ``mappings`` say.

A block of a canonical tensor is read from those rows of the Hugging Face tensors that it is made of, and no others.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_aligner.checkpoint.hf_config import dims_of, family_of
from nemo_aligner.checkpoint.mappings.table import Dims, Family, Rule
from nemo_aligner.checkpoint.tensor_files import TensorSource
from nemo_aligner.errors import UserError

# NeMo's reward head has a bias, Hugging Face's has none.
HEAD_WEIGHT, HEAD_BIAS = "rm_head.weight", "rm_head.bias"

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class MappedTensor:
    """A canonical tensor: for each of ``groups`` alike, rows of every source in order."""

    name: str
    sources: dict[str, Shape]
    groups: int
    is_vocabulary: bool

    @property
    def shape(self) -> Shape:
        """The canonical tensor's shape."""
        shapes = list(self.sources.values())
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Canonical to Hugging Face."""
        by_group = tensor.reshape(self.groups, -1, *tensor.shape[1:])
        rows = [shape[0] // self.groups for shape in self.sources.values()]
        return [part.flatten(0, 1) for part in by_group.split(rows, dim=1)]

    def read(self, tensors: TensorSource, start: Shape, size: Shape, *, where: str) -> Tensor:
        """The block that begins at ``start``; start and size have one number per axis."""
        runs = list(self._runs(start[0], start[0] + size[0]))
        columns = [slice(at, at + length) for at, length in zip(start[1:], size[1:], strict=True)]
        parts: dict[str, tuple[int, Tensor]] = {}
        for name in dict.fromkeys(name for name, _, _ in runs):
            low = min(begin for source, begin, _ in runs if source == name)
            high = max(end for source, _, end in runs if source == name)
            parts[name] = low, tensors.read(name, (slice(low, high), *columns))
        if len({part.dtype for _, part in parts.values()}) > 1:
            raise UserError(
                f"{where}: {list(self.sources)} differ in dtype", fix="convert the model to one dtype"
            )
        pieces = [parts[name][1][begin - parts[name][0] : end - parts[name][0]] for name, begin, end in runs]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _runs(self, first: int, last: int) -> Iterator[tuple[str, int, int]]:
        """(source, its first row, its last row + 1) of what makes up the canonical rows from first to last - 1."""
        row = 0
        for group in range(self.groups):
            for name, shape in self.sources.items():
                rows = shape[0] // self.groups
                low, high = max(first - row, 0), min(last - row, rows)
                if low < high:
                    yield name, group * rows + low, group * rows + high
                row += rows


def mapped_tensors(family: Family, config: dict[str, Any]) -> list[MappedTensor]:
    """Every tensor of the model in order of layers; the embedding is the first."""
    dims = dims_of(config)
    found = [_mapped(rule, dims) for rule in family.outer]
    for layer in range(dims.layers):
        for rule in family.layer:
            found += [_mapped(rule, dims, layer=layer, kind=kind) for kind in _kinds(rule, config)]
    if family.rewards or not config["share_embeddings_and_output_weights"]:
        found.append(_mapped(family.head, dims))
    return found


def _kinds(rule: Rule, config: dict[str, Any]) -> tuple[str, ...]:
    """The suffixes of its name: a linear layer has a weight and may have a bias."""
    if not rule.biased_by:
        return ("",)
    return ("weight", "bias") if any(config.get(key) for key in rule.biased_by) else ("weight",)


def _mapped(rule: Rule, dims: Dims, *, layer: int | None = None, kind: str = "") -> MappedTensor:
    ours, theirs = ("", "") if layer is None else (f"decoder.layers.{layer}.", f"model.layers.{layer}.")
    end = kind and f".{kind}"
    sources = {
        f"{theirs}{name}{end}": tuple(getattr(dims, axis) for axis in (axes[:1] if kind == "bias" else axes))
        for name, axes in rule.sources.items()
    }
    return MappedTensor(
        name=f"{ours}{rule.nemo}{end}",
        sources=sources,
        groups=dims.groups if rule.by_group else 1,
        is_vocabulary=rule.is_vocabulary,
    )


class MappedWeights:
    """A model's weights by canonical name.

    Args:
        config: model_config.yaml of an imported model, which names the architecture.
        tensors: the weights by Hugging Face's names, known to be complete.
        where: names them in messages.
    """

    def __init__(self, config: dict[str, Any], tensors: TensorSource, *, where: str) -> None:
        self.where = where
        family = family_of({"architectures": [config["huggingface"]["architecture"]]}, where)
        self._tensors = tensors
        self._mapped = {mapped.name: mapped for mapped in mapped_tensors(family, config)}
        self.shapes = {name: mapped.shape for name, mapped in self._mapped.items()}
        if HEAD_WEIGHT in self.shapes:
            self.shapes[HEAD_BIAS] = self.shapes[HEAD_WEIGHT][:1]

    def read(self, name: str, start: Shape, size: Shape) -> Tensor:
        """The block of tensor ``name`` that begins at ``start``; start and size have one number per axis."""
        if name == HEAD_BIAS:
            return torch.zeros(size, dtype=self.read(HEAD_WEIGHT, (0, 0), (1, 1)).dtype)
        return self._mapped[name].read(self._tensors, start, size, where=self.where)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """(canonical name, full tensor) of each, read one at a time."""
        for name, shape in self.shapes.items():
            yield name, self.read(name, (0,) * len(shape), shape)
