# SPDX-License-Identifier: Apache-2.0
"""A model's weights as a distributed checkpoint: full tensors by canonical name on one side, mcore's keys
on the other.

Layers are stacked along a first axis as mcore's TransformerBlock saves them, and keys carry the prefix that
a GPTModel is loaded with, so the folder loads at any TP x PP. No model is built and no more than one tensor
is in memory.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from nemo_aligner.checkpoint.finite import is_finite
from nemo_aligner.checkpoint.torch_dist import FolderReader, FolderWriter
from nemo_aligner.errors import UserError

_MOST_LAYERS = 10_000
_PREFIX = "model."
_LAYER_NAME = re.compile(r"(decoder\.layers)\.(\d+)\.(.+)")
_VOCABULARY_NAMES = ("embedding.word_embeddings.weight", "output_layer.weight")

# mcore asks for an object beside each of these modules' weights; None is what it saves without FP8.
_LAYER_MODULES_WITH_STATE = (
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_HEAD_NORMS = ("self_attention.q_layernorm", "self_attention.k_layernorm")


def save_weights(
    folder: Path, weights: Iterable[tuple[str, Tensor]], num_layers: int, *, vocab_multiple: int = 1
) -> None:
    """Writes ``weights`` (canonical name, full tensor) to ``folder`` as they come.

    Args:
        folder: created where it is missing.
        weights: each tensor once, in any order; every layer has the same names, shapes and dtypes.
        num_layers: the number of decoder layers.
        vocab_multiple: rows of the embedding and of the output layer are zero padded to a multiple of this.

    Raises:
        UserError: a layer's tensor is missing, layers differ in dtype, or a number is not finite.
    """
    layers_of: dict[str, dict[int, torch.dtype]] = {}
    with FolderWriter(folder) as writer:
        for name, tensor in weights:
            if not is_finite([tensor]):
                raise UserError(
                    f"{name} holds numbers that are infinite or NaN", fix="convert an intact model"
                )
            if name in _VOCABULARY_NAMES:
                tensor = pad_rows(tensor, vocab_multiple)
            match = _LAYER_NAME.fullmatch(name)
            if match is None:
                writer.add(_PREFIX + name, tensor, offsets=(0,) * tensor.ndim, shape=tuple(tensor.shape))
                continue
            key, layer = f"{_PREFIX}{match[1]}.{match[3]}", int(match[2])
            dtypes = layers_of.setdefault(key, {})
            dtypes[layer] = tensor.dtype
            if len(set(dtypes.values())) > 1:
                raise UserError(
                    f"{name} is {tensor.dtype}, the same tensor of other layers is {dtypes[min(dtypes)]}",
                    fix="convert the whole model to one dtype first",
                )
            writer.add(
                key, tensor[None], offsets=(layer,) + (0,) * tensor.ndim, shape=(num_layers, *tensor.shape)
            )
        for key, dtypes in layers_of.items():
            if missing := sorted(set(range(num_layers)) - dtypes.keys()):
                raise UserError(f"{key} is missing in layers {missing}", fix="convert a complete model")
        head_norms = [m for m in _HEAD_NORMS if f"{_PREFIX}decoder.layers.{m}.weight" in layers_of]
        for module in (*_LAYER_MODULES_WITH_STATE, *head_norms):
            for layer in range(num_layers):
                writer.add_object(
                    f"{_PREFIX}decoder.layers.{module}._extra_state/shard_{layer}_{num_layers}", [None]
                )
        writer.add_object(f"{_PREFIX}decoder.final_layernorm._extra_state/shard_0_1", [None])


Shape = tuple[int, ...]


class NamedWeights(Protocol):
    """Tensors by canonical name, in whatever form they are stored."""

    where: str  # names them in messages
    shapes: dict[str, Shape]

    def read(self, name: str, start: Shape, size: Shape, /) -> Tensor:
        """The block of a tensor that begins at ``start``; start and size have one number per axis."""
        ...


class WeightReader:
    """Reads the tensors of a distributed checkpoint by canonical name, one at a time.

    Raises:
        UserError: the folder is not a checkpoint, or is damaged or hostile.
    """

    def __init__(self, folder: Path) -> None:
        self._reader, self.where = FolderReader(folder), str(folder)
        # Where each tensor lies: all of a key, or its layer of that number.
        self._places: dict[str, tuple[str, int | None]] = {}
        for key, entry in self._reader.tensors.items():
            if not key.startswith(_PREFIX):
                continue
            name = key.removeprefix(_PREFIX)
            if not name.startswith("decoder.layers.") or _LAYER_NAME.fullmatch(name):
                self._places[name] = key, None
                continue
            rest = name.removeprefix("decoder.layers.")
            shape = tuple(entry.size)
            if not shape or shape[0] > _MOST_LAYERS:
                raise UserError(
                    f"{folder}: {key} has shape {shape}, whose first axis is to be layers",
                    fix="get the checkpoint again from where it came",
                )
            for layer in range(shape[0]):
                self._places[f"decoder.layers.{layer}.{rest}"] = key, layer

        # By canonical name; rows of the vocabulary include the padding.
        self.shapes: dict[str, Shape] = {
            name: tuple(self._reader.tensors[key].size)[0 if layer is None else 1 :]
            for name, (key, layer) in self._places.items()
        }

    def read(self, name: str, start: Shape | None = None, size: Shape | None = None) -> Tensor:
        """The tensor, or a block of it; rows of the vocabulary include the padding."""
        (key, layer), size = self._places[name], size or self.shapes[name]
        start = start or (0,) * len(size)
        if layer is None:
            return self._reader.read(key, start, size)
        return self._reader.read(key, (layer, *start), (1, *size))[0]

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that a tensor is stored in."""
        return self._reader.tensors[self._places[name][0]].properties.dtype


def precision_of(dtype: torch.dtype, where: str) -> str | int:
    """model_config.yaml's ``precision`` for weights of ``dtype``; ``where`` names them in messages."""
    match dtype:
        case torch.bfloat16:
            return "bf16"
        case torch.float16:
            return 16
        case torch.float32:
            return 32
    raise UserError(f"{where}: weights in {dtype} are not supported", fix="convert them to bfloat16 first")


def pad_rows(tensor: Tensor, multiple: int) -> Tensor:
    """``tensor`` with zero rows up to a multiple of so many."""
    missing = -tensor.shape[0] % multiple
    return torch.nn.functional.pad(tensor, (*(0, 0) * (tensor.ndim - 1), 0, missing)) if missing else tensor
