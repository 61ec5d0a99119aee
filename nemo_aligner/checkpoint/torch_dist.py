# SPDX-License-Identifier: Apache-2.0
"""The torch_dist checkpoint folder as files: tensors are added and read one at a time, without a process
group.

The folder holds data files (``*.distcp``: serialised tensors, end to end), ``.metadata`` (a pickle that
says which part of which tensor lies where), ``metadata.json``, and plain values: in ``common.pt``, or
from megatron-core 0.19 on as one more entry. megatron-core's dist_checkpointing reads and writes the
same. Nothing in a folder can run code here: the pickle is read by an unpickler that knows this format's
classes only. Knows no model.
"""

import io
import json
import math
import pickle
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, ClassVar, Self

import torch
from torch import Tensor

# The classes of the file format; no process group is used.
from torch.distributed.checkpoint.filesystem import _StorageInfo  # noqa: TID251
from torch.distributed.checkpoint.metadata import (  # noqa: TID251
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_aligner.errors import UserError, report_damage

_DATA_FILE_BYTES = 4 * 1024**3
_COMMON_KEY = "common_state/shard_0_1"  # under which megatron-core 0.19 stores plain values
_DOWNLOAD_AGAIN = (
    "get the checkpoint again from where it came; it is damaged or was not made by a training job"
)

_FORMAT = "torch.distributed.checkpoint"
_ALLOWED = {
    f"{_FORMAT}.metadata": "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta "
    "TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING",
    f"{_FORMAT}.filesystem": "_StorageInfo _StoragePrefix",
    f"{_FORMAT}.planner": "SavePlan TensorWriteData WriteItem WriteItemType BytesIOWriteData",
    "torch.distributed._shard.sharded_tensor.metadata": "TensorProperties MEM_FORMAT_ENCODING",
    "megatron.core.dist_checkpointing.strategies.torch": "MCoreMetadata MCoreSavePlan",
    "torch.serialization": "_get_layout",
    "torch": " ".join(["Size", *(str(x)[6:] for x in vars(torch).values() if isinstance(x, torch.dtype))]),
    "collections": "OrderedDict",
    "pathlib": "PosixPath Path",
    "builtins": "set",
}
_ALLOWED_GLOBALS = frozenset((module, name) for module, names in _ALLOWED.items() for name in names.split())


class _MetadataUnpickler(pickle._Unpickler):
    """Refuses every class and function that a .metadata file has no use for.

    The one written in Python: the other takes as much memory as a damaged length asks for.
    """

    # A bytearray is made before its bytes are looked for; none is in such a file.
    dispatch: ClassVar = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def __init__(self, path: Path) -> None:
        super().__init__(io.BytesIO(path.read_bytes()))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        if (module, name) not in _ALLOWED_GLOBALS:
            raise UserError(
                f"{self._path} names {module}.{name}, which no checkpoint needs and which could run code",
                fix="do not load this file; get the checkpoint again from its publisher",
            )
        return super().find_class(module, name)


def read_backend(folder: Path) -> str | None:
    """The tensor format that metadata.json names ("torch_dist", "zarr"), None where there is no such file."""
    path = folder / "metadata.json"
    if not path.is_file():
        return None
    with report_damage(f"{path} is not a checkpoint's metadata.json", fix=_DOWNLOAD_AGAIN):
        return str(json.loads(path.read_text())["sharded_backend"])


def check_folder(folder: Path) -> None:
    """Raises UserError unless ``folder`` is a whole torch_dist checkpoint that cannot run code when it is
    loaded.

    To be called before megatron-core gets the folder: its loader unpickles .metadata and the object entries
    without restriction.
    """
    reader = FolderReader(folder)
    reader.common()
    for key, value in reader.objects():
        _check_extra_state(value, where=f"{folder}: {key}")


class FolderReader:
    """Reads any block of any tensor of a torch_dist folder, whatever sharding it was saved with.

    Raises:
        UserError: the folder is not torch_dist, is incomplete, or its .metadata holds anything but metadata.
    """

    def __init__(self, folder: Path) -> None:
        if (backend := read_backend(folder)) != "torch_dist":
            raise UserError(
                f"{folder} is not a torch_dist checkpoint (metadata.json says {backend})", fix=_DOWNLOAD_AGAIN
            )
        self._folder = folder
        metadata = _read_metadata(folder)
        self._storage: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self._object_keys = [
            k for k, v in metadata.state_dict_metadata.items() if isinstance(v, BytesStorageMetadata)
        ]
        self.tensors = {
            k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)
        }

    def read(self, key: str, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """The block of tensor ``key`` that begins at ``start``; start and size have one number per axis."""
        entry = self.tensors[key]
        parts = []
        for chunk in entry.chunks:
            low = [max(a, b) for a, b in zip(start, chunk.offsets, strict=True)]
            high = [
                min(a + n, b + m) for a, n, b, m in zip(start, size, chunk.offsets, chunk.sizes, strict=True)
            ]
            if all(a < b for a, b in zip(low, high, strict=True)):
                parts.append((chunk, low, high))
        stored = sum(math.prod(b - a for a, b in zip(low, high, strict=True)) for _, low, high in parts)
        # Before memory is taken: the sizes are the file's word.
        if stored != math.prod(size):
            raise UserError(
                f"{self._folder}: {stored} of {math.prod(size)} values of {key} at {start} are stored",
                fix=_DOWNLOAD_AGAIN,
            )
        block = torch.empty(size, dtype=entry.properties.dtype)
        for chunk, low, high in parts:
            source = self._read_chunk(key, chunk)
            inner = source[
                tuple(slice(a - o, b - o) for a, b, o in zip(low, high, chunk.offsets, strict=True))
            ]
            block[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, start, strict=True))] = inner
        return block

    @property
    def has_common_file(self) -> bool:
        """True if plain values lie in a file of their own, as megatron-core 0.16 writes them."""
        return (self._folder / "common.pt").is_file()

    def common(self) -> dict[str, Any]:
        """The plain values that were saved beside the tensors."""
        if self.has_common_file:
            path = self._folder / "common.pt"
            return _load_safely(path.open("rb"), where=str(path))
        if _COMMON_KEY not in self._object_keys:
            raise UserError(f"{self._folder} has no common.pt", fix=_DOWNLOAD_AGAIN)
        match self._load(MetadataIndex(_COMMON_KEY)):
            case [dict(common)]:
                return common
            case other:
                raise UserError(
                    f"{self._folder}: {_COMMON_KEY} holds {type(other).__name__}", fix=_DOWNLOAD_AGAIN
                )

    def objects(self) -> Iterator[tuple[str, Any]]:
        """Every entry that is not a tensor, with its value."""
        for key in self._object_keys:
            yield key, self._load(MetadataIndex(key))

    def _read_chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        tensor = self._load(MetadataIndex(key, chunk.offsets))
        if not isinstance(tensor, Tensor) or tensor.shape != torch.Size(chunk.sizes):
            raise UserError(
                f"{self._folder}: the part of {key} at {tuple(chunk.offsets)} is damaged", fix=_DOWNLOAD_AGAIN
            )
        return tensor

    def _load(self, index: MetadataIndex) -> Any:  # noqa: ANN401
        key, info = index.fqn, self._storage.get(index)
        if info is None:
            raise UserError(
                f"{self._folder}: .metadata does not say where {key} is stored", fix=_DOWNLOAD_AGAIN
            )
        with (self._folder / info.relative_path).open("rb") as stream:
            stream.seek(info.offset)
            return _load_safely(io.BytesIO(stream.read(info.length)), where=f"{self._folder}: {key}")


class FolderWriter(AbstractContextManager["FolderWriter"]):
    """Writes a torch_dist folder chunk by chunk; what was added is on disk, not in memory.

    Leaving the context without an error writes the metadata, which is what makes the folder a checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self._num_files = 0
        self._stream: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()
        if kind is None:
            self._write_metadata()

    def add(self, key: str, chunk: Tensor, *, offsets: tuple[int, ...], shape: tuple[int, ...]) -> None:
        """Adds the block of tensor ``key`` (whole shape ``shape``) that begins at ``offsets``."""
        assert chunk.ndim == len(offsets) == len(shape), (key, chunk.shape, offsets, shape)
        entry = self._tensors.setdefault(
            key,
            TensorStorageMetadata(
                properties=TensorProperties(dtype=chunk.dtype), size=torch.Size(shape), chunks=[]
            ),
        )
        assert isinstance(entry, TensorStorageMetadata), key
        assert entry.properties.dtype == chunk.dtype, (key, chunk.dtype)
        index = MetadataIndex(key, offsets, len(entry.chunks))
        entry.chunks.append(ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=chunk.shape))
        # torch.save writes the whole storage behind a view.
        self._store(index, chunk.detach().clone(memory_format=torch.contiguous_format))

    def add_object(self, key: str, value: list[Any]) -> None:
        """Adds an entry that is not a tensor."""
        self._tensors[key] = BytesStorageMetadata()
        self._store(MetadataIndex(key), value)

    def _store(self, index: MetadataIndex, value: Tensor | list[Any]) -> None:
        if self._stream is None or self._stream.tell() >= _DATA_FILE_BYTES:
            if self._stream is not None:
                self._stream.close()
            self._stream = (self._folder / f"__0_{self._num_files}.distcp").open("wb")
            self._num_files += 1
        begin = self._stream.tell()
        torch.save(value, self._stream)
        name = Path(self._stream.name).name
        self._storage[index] = _StorageInfo(
            relative_path=name, offset=begin, length=self._stream.tell() - begin
        )

    def _write_metadata(self) -> None:
        torch.save({}, self._folder / "common.pt")
        backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
        versions = {"sharded_backend_version": 1, "common_backend_version": 1}
        (self._folder / "metadata.json").write_text(json.dumps(backends | versions))
        metadata = Metadata(state_dict_metadata=self._tensors, planner_data={}, storage_data=self._storage)
        with (self._folder / ".metadata").open("wb") as stream:
            pickle.dump(metadata, stream)


def _read_metadata(folder: Path) -> Metadata:
    path = folder / ".metadata"
    if not path.is_file():
        raise UserError(
            f"{folder} has no .metadata file, so its tensors cannot be found", fix=_DOWNLOAD_AGAIN
        )
    with report_damage(f"{path} is damaged", fix=_DOWNLOAD_AGAIN):
        metadata = _MetadataUnpickler(path).load()
        _check_metadata(metadata, folder)
    return metadata


def _check_metadata(metadata: Metadata, folder: Path) -> None:
    """Raises UserError or TypeError where an entry points outside the folder or past the end of a file."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise TypeError(f"it holds {type(metadata).__name__}")
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    for index, info in metadata.storage_data.items():
        if not (isinstance(index, MetadataIndex) and isinstance(info, _StorageInfo)):
            raise TypeError(f"it stores {index} in {info}")
        _check_natural((info.offset, info.length), f"{index.fqn} is stored")
        if info.relative_path not in sizes:
            raise UserError(
                f"{folder}: {index.fqn} is stored in {info.relative_path}, which is not in the folder",
                fix=_DOWNLOAD_AGAIN,
            )
        if info.offset + info.length > sizes[info.relative_path]:
            raise UserError(
                f"{folder / info.relative_path} is cut short: {index.fqn} lies past its end",
                fix=_DOWNLOAD_AGAIN,
            )

    for key, entry in metadata.state_dict_metadata.items():
        if not (isinstance(key, str) and isinstance(entry, TensorStorageMetadata | BytesStorageMetadata)):
            raise TypeError(f"it says {type(entry).__name__} of {key}")
        if isinstance(entry, TensorStorageMetadata):
            _check_tensor(key, entry, metadata.storage_data)


def _check_tensor(key: str, entry: TensorStorageMetadata, storage: dict[MetadataIndex, _StorageInfo]) -> None:
    """Raises TypeError or ValueError where chunks lie outside the tensor or have more values than are stored."""
    _check_natural(entry.size, f"the size of {key} is")
    dtype = entry.properties.dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"the dtype of {key} is {dtype}")
    for chunk in entry.chunks:
        _check_natural(chunk.offsets, f"a chunk of {key} is at")
        _check_natural(chunk.sizes, f"a chunk of {key} has size")
        stops = [a + n for a, n in zip(chunk.offsets, chunk.sizes, strict=True)]
        if any(stop > size for stop, size in zip(stops, entry.size, strict=True)):
            raise ValueError(f"a chunk of {key} ends at {stops}, outside {list(entry.size)}")
        info = storage.get(MetadataIndex(key, chunk.offsets))
        # A tensor is stored as it lies in memory.
        if info is not None and math.prod(chunk.sizes) * dtype.itemsize > info.length:
            raise ValueError(
                f"{list(chunk.sizes)} values of {key} do not fit into the {info.length} bytes stored"
            )


def _check_natural(numbers: Iterable[object], what: str) -> None:
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise TypeError(f"{what} {numbers}")


def _load_safely(stream: IO[bytes], *, where: str) -> Any:  # noqa: ANN401
    with (
        report_damage(f"{where} is damaged or holds more than tensors", fix=_DOWNLOAD_AGAIN),
        stream,
        torch.serialization.safe_globals([io.BytesIO]),
    ):
        return torch.load(stream, map_location="cpu", weights_only=True)


def _check_extra_state(value: Any, *, where: str) -> None:  # noqa: ANN401
    """Transformer Engine unpickles a non-empty byte tensor found here, and torch.loads a BytesIO."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, io.BytesIO):
            _load_safely(io.BytesIO(item.getvalue()), where=where)
        elif isinstance(item, Tensor) and item.dtype == torch.uint8 and item.numel() > 0:
            raise UserError(
                f"{where} holds pickled FP8 state, which could run code", fix="save the model without FP8"
            )
