# SPDX-License-Identifier: Apache-2.0
"""The weight files of a Hugging Face folder, read tensor by tensor and written shard by shard.

Reads model.safetensors, its sharded form and pytorch_model*.bin (weights only); writes safetensors. Knows
no model.
"""

import json
import logging
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_aligner.checkpoint.sources import GET_AGAIN, weight_files
from nemo_aligner.errors import UserError, report_damage

_log = logging.getLogger(__name__)

Plan = dict[str, int]  # tensor name to its bytes, in the order of writing


class TensorSource(Protocol):
    """Tensors by Hugging Face name, wherever they are stored."""

    shapes: dict[str, tuple[int, ...]]

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that :meth:`read` gives."""
        ...

    def read(self, name: str, block: tuple[slice, ...] = ()) -> Tensor:
        """The tensor, or the block of it that the slices of its axes cut out."""
        ...


class HuggingFaceTensors:
    """The tensors of a folder that transformers' save_pretrained wrote, in whichever form.

    Raises:
        UserError: there are no weights, a shard is missing, or a file is damaged or holds more than tensors.
    """

    def __init__(self, folder: Path) -> None:
        self._pickled: tuple[Path, dict[str, Tensor]] | None = None
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        files, place = weight_files(folder)
        for file in files:
            found = self._shapes_in(file)
            mine = (
                found if place is None else {name: found[name] for name in found if place.get(name) == file}
            )
            self._file_of |= dict.fromkeys(mine, file)
            self.shapes |= mine
            if ignored := found.keys() - mine.keys():
                _log.warning(
                    "%s holds tensors that the index does not look for there, and that are not read: %s",
                    *(file, shortened(ignored)),
                )
        if place is not None and (lost := sorted(place.keys() - self.shapes.keys())):
            raise UserError(
                f"{place[lost[0]]} lacks tensors that its index names: {shortened(lost)}", fix=GET_AGAIN
            )

    def dtype_of(self, name: str) -> torch.dtype:
        """See TensorSource."""
        # A block without rows has a dtype, too.
        return self.read(name, (slice(0, 0),)).dtype

    def read(self, name: str, block: tuple[slice, ...] = ()) -> Tensor:
        """See TensorSource."""
        file = self._file_of[name]
        if file.suffix == ".bin":
            return self._load_pickled(file)[name][block]
        return read_safetensors(file, name, block)

    def _shapes_in(self, file: Path) -> dict[str, tuple[int, ...]]:
        if file.suffix == ".bin":
            return {name: tuple(tensor.shape) for name, tensor in self._load_pickled(file).items()}
        return safetensors_shapes(file)

    def _load_pickled(self, file: Path) -> dict[str, Tensor]:
        if self._pickled is None or self._pickled[0] != file:
            self._pickled = None  # releases one shard before the next is read
            self._pickled = (file, load_pickled(file))
        return self._pickled[1]


def save_safetensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a file that transformers reads."""
    save_file({name: x.contiguous() for name, x in tensors.items()}, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors makes it private


def safetensors_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a file, by name; UserError where it is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{file} is not a whole safetensors file: {error}", fix=GET_AGAIN) from error


def read_safetensors(file: Path, name: str, block: tuple[slice, ...] = ()) -> Tensor:
    """A tensor of a file, or the block of it that the slices cut out; UserError where the file is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.get_slice(name)[block] if block else opened.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{file}: {name} cannot be read: {error}", fix=GET_AGAIN) from error


def load_pickled(file: Path) -> dict[str, Tensor]:
    """A state dict written by torch.save, memory mapped where its format allows; other entries are dropped.

    Raises:
        UserError: the file is damaged or would run code.
    """
    with report_damage(f"{file} is damaged or holds more than tensors", fix=GET_AGAIN):
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    if not isinstance(loaded, dict):
        raise UserError(f"{file} holds no state dict but {type(loaded).__name__}", fix=GET_AGAIN)
    return {
        name: value for name, value in loaded.items() if isinstance(name, str) and isinstance(value, Tensor)
    }


def write_safetensors(
    folder: Path, plan: Plan, read: Callable[[str], Tensor], *, max_shard_bytes: int
) -> None:
    """Writes model.safetensors, or shards of at most ``max_shard_bytes`` and their index.

    Args:
        folder: where to.
        plan: every tensor and its bytes, known before any is read, so that shards can be named.
        read: gives a tensor; called once each, in order; one shard is in memory.
        max_shard_bytes: a tensor larger than this gets a shard of its own.
    """
    split = split_state_dict_into_shards_factory(
        plan,
        get_storage_size=lambda num_bytes: num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        save_safetensors({name: read(name) for name in names}, folder / file)
    if split.is_sharded:
        document = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(document, indent=2) + "\n")


def shortened(names: Iterable[str]) -> str:
    """The first five names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
