# SPDX-License-Identifier: Apache-2.0
"""Blocks of canonical tensors: those of the whole, read from no more rows and columns than they need."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemo_aligner.checkpoint.huggingface import import_huggingface
from nemo_aligner.checkpoint.mapped import MappedWeights
from nemo_aligner.checkpoint.tensor_files import HuggingFaceTensors


class Counting:
    """A source of tensors that counts the values that were read."""

    def __init__(self, folder: Path) -> None:
        self._tensors, self.num_values = HuggingFaceTensors(folder), 0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._tensors.shapes

    def dtype_of(self, name: str) -> torch.dtype:
        return self._tensors.dtype_of(name)

    def read(self, name: str, block: tuple[slice, ...] = ()) -> Tensor:
        found = self._tensors.read(name, block)
        self.num_values += found.numel()
        return found


def blocks(shape: tuple[int, ...], axis: int, parts: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(start, size) of equal parts along an axis."""
    rows = shape[axis] // parts
    size = (*shape[:axis], rows, *shape[axis + 1 :])
    return [
        (tuple(part * rows if a == axis else 0 for a in range(len(shape))), size) for part in range(parts)
    ]


@pytest.mark.parametrize("name", ["llama-bias", "qwen2", "nemotron", "qwen3"])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_ranks_read_their_blocks_alone(hf_folder: Callable[..., Path], name: str, form: str):
    folder = hf_folder(name)
    imported = import_huggingface(folder)
    whole = dict(imported.weights)
    if form == "bin":
        tensors = HuggingFaceTensors(folder)
        torch.save({key: tensors.read(key) for key in tensors.shapes}, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    for key, tensor in whole.items():
        # gate and up are blocks of their own
        halves = 2 if "linear_fc1.weight" in key and name != "nemotron" else 1
        for axis in range(tensor.ndim):
            for parts in (1, 2, 4):
                if tensor.shape[axis] % (parts * halves):
                    continue
                source = Counting(folder)
                weights = MappedWeights(imported.config, source, where="here")
                found = [
                    weights.read(key, *block) for block in blocks(tuple(tensor.shape), axis, parts * halves)
                ]
                assert torch.equal(torch.cat(found, dim=axis), tensor), (key, axis, parts)
                assert source.num_values == tensor.numel(), (key, axis, parts)
