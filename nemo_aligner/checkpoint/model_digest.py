# SPDX-License-Identifier: Apache-2.0
"""A quick digest of a whole model, by which models differ. It proves nothing about their files: digests.py does."""

import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path

from nemo_aligner.checkpoint.nemo_archive import CONFIG_NAME, WEIGHTS_NAME
from nemo_aligner.checkpoint.sources import is_huggingface, weight_files

_SAMPLE_BYTES = 64 * 1024
_SAMPLES = 16  # of each file


def model_digest(path: Path) -> str:
    """Equal for models of equal content in one form, or as a .nemo and its folder; reads at most a MiB of each file.

    It covers the config and the weights: training moves every number of a weight, so that a sample shows it.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, file, start, size in sorted(_parts(path)):
        digest.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as stream:
            step = max(1, (size - _SAMPLE_BYTES) // (_SAMPLES - 1)) if size > _SAMPLE_BYTES else size or 1
            for offset in range(0, size, step):
                stream.seek(start + offset)
                digest.update(stream.read(min(_SAMPLE_BYTES, size - offset)))
    return digest.hexdigest()


def _parts(path: Path) -> Iterator[tuple[str, Path, int, int]]:
    """(name, the file that holds it, where it begins there, bytes) of what makes up the model."""
    if is_huggingface(path):
        for file in (path / "config.json", *weight_files(path)[0]):
            yield file.name, file, 0, file.stat().st_size
    elif path.is_dir():
        for file in path.rglob("*"):
            name = file.relative_to(path).as_posix()
            if file.is_file() and _belongs(name):
                yield name, file, 0, file.stat().st_size
    else:
        yield from _members(path)


def _members(path: Path) -> Iterator[tuple[str, Path, int, int]]:
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = Path(member.name).as_posix()
                if member.isfile() and _belongs(name):
                    yield name, path, member.offset_data, member.size
    except tarfile.TarError:
        # Compressed, where all of it would have to be read to find its members; or a GGUF file.
        yield path.suffix, path, 0, path.stat().st_size


def _belongs(name: str) -> bool:
    return name == CONFIG_NAME or name.startswith(f"{WEIGHTS_NAME}/")
