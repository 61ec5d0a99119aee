# SPDX-License-Identifier: Apache-2.0
"""The .nemo file: a tar (or a folder with the same content) of model_config.yaml, tokenizer files and
model_weights/.

Opening checks every member before anything is written; writing is atomic. Knows no key of the config.
"""

import contextlib
import logging
import lzma
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from nemo_aligner.checkpoint.digests import Digests, find_damage, refuse_damage, write_digests
from nemo_aligner.checkpoint.nemo_config import CONFIG_NAME, parse_config
from nemo_aligner.errors import UserError

WEIGHTS_NAME = "model_weights"

_PACKED = ".packed"  # the archive, until it is whole
_COPY_BYTES = 16 * 1024**2
_GET_AGAIN = "get the file again from its publisher; a .nemo is a tar of plain files"
_CONVERTER = "python examples/nlp/gpt/convert_nemo_gpt_to_mcore.py"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelArchive:
    """An opened model, valid while its context is; how its weights are read depends on its form."""

    source: Path  # what was opened, for messages
    folder: Path  # where its files lie
    config: dict[str, Any]  # model_config.yaml

    def file(self, name: str) -> Path:
        """A file or folder of the archive by the name that the config gives it, with or without "nemo:".

        Raises:
            UserError: it is not there, or the name leads out of the archive.
        """
        path = self.folder / name.removeprefix("nemo:")
        try:
            is_within = path.resolve().is_relative_to(self.folder.resolve())
            exists = path.exists()
        except (OSError, ValueError) as error:  # too long, or with characters that no name has
            raise UserError(
                f"{self.source}: the config names a file {name[:60]!r}, which no file is called",
                fix=_GET_AGAIN,
            ) from error
        if not is_within:
            raise UserError(
                f"{self.source}: the config names {name}, which is outside the archive", fix=_GET_AGAIN
            )
        if not exists:
            raise UserError(f"{self.source} holds no {name}, which its config names", fix=_GET_AGAIN)
        return path

    def has_folder(self, name: str) -> bool:
        """True if ``name`` is a folder of the archive."""
        try:
            return self.file(name).is_dir()
        except UserError:
            return False


@dataclass(frozen=True, kw_only=True)
class NemoArchive(ModelArchive):
    """An opened .nemo."""

    @property
    def weights(self) -> Path:
        """The distributed checkpoint of the weights."""
        return self.folder / WEIGHTS_NAME


@contextlib.contextmanager
def open_nemo(path: Path | str, *, old_layouts: bool = False, check: bool = True) -> Iterator[NemoArchive]:
    """Opens a .nemo file (extracted to a temporary folder, removed afterwards) or an extracted folder (used
    in place).

    Args:
        path: the file or folder.
        old_layouts: whether weights that are no distributed checkpoint are let through.
        check: whether files are compared with their digests here.

    Raises:
        UserError: it is not there, damaged, hostile, or its weights are in an old layout.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        if path.is_dir():
            folder = path
        elif path.is_file():
            with _open_tar(path) as tar:
                members = _checked_members(tar, path)
                temporary = tempfile.TemporaryDirectory(prefix="nemo_aligner_", ignore_cleanup_errors=True)
                folder = Path(stack.enter_context(temporary))
                _extract(tar, members, folder, path)
        else:
            raise UserError(
                f"{path} does not exist", fix="give the path of a .nemo file or of its extracted folder"
            )
        archive = NemoArchive(source=path, folder=folder, config=_read_config(folder, path))
        if not old_layouts:
            _check_weights_layout(archive)
        if check:
            refuse_damaged(path, find_damage(folder))
        yield archive


def peek_config(path: Path | str) -> dict[str, Any] | None:
    """model_config.yaml of a .nemo file or folder, read without unpacking the rest and without torch.

    Returns:
        None where it cannot be had so; opening the archive reports why.
    """
    path = Path(path)
    if path.is_dir():
        return _read_config(path, path) if (path / CONFIG_NAME).is_file() else None
    try:
        # Not of a compressed archive, all of which would be unpacked on the way.
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                if PurePosixPath(member.name) == PurePosixPath(CONFIG_NAME):
                    content = tar.extractfile(member)
                    return parse_config(content.read(), path) if content else None
            return None
    except (tarfile.TarError, OSError, KeyError):
        return None  # opening it reports why


def refuse_damaged(path: Path, damage: list[str] | None) -> None:
    """Raise UserError for a .nemo with ``damage``; an edited model_config.yaml of an extracted one is only logged.

    Raises:
        UserError: a file is not what was written.
    """
    edited = [one for one in damage or () if path.is_dir() and one.startswith(f"{CONFIG_NAME} ")]
    for one in edited:
        _log.warning("%s: %s; it is taken as it is", path, one)
    refuse_damage(path, None if damage is None else [one for one in damage if one not in edited])


def write_nemo(
    path: Path | str,
    *,
    config: Mapping[str, Any],
    files: Mapping[str, Path | bytes],
    weights: Callable[[Path], Digests | None],
    overwrite: bool = False,
) -> None:
    """Writes a .nemo; ``path`` is replaced in one step at the end, so that an interrupted run leaves
    nothing half done.

    Args:
        path: where to; one that ends with "/" or is a folder gets the extracted layout.
        config: becomes model_config.yaml; plain dicts, lists, strings and numbers.
        files: name within the archive to a file or its content.
        weights: writes the distributed checkpoint into the folder it is given; it may give the digests of files
            there.
        overwrite: whether an existing .nemo is replaced.

    Raises:
        UserError: ``path`` exists and ``overwrite`` is False, or it is a folder that is no extracted .nemo.
    """
    check_output(path, overwrite=overwrite)
    as_folder = _is_folder(path)
    path = Path(path)
    with staged(path) as staging:
        write_contents(staging, config=config, files=files)
        known = weights(staging / WEIGHTS_NAME) or {}
        write_digests(staging, {f"{WEIGHTS_NAME}/{name}": digest for name, digest in known.items()})
        if as_folder:
            replace_folder(staging, path)
        else:
            _pack(staging, staging / _PACKED)
            (staging / _PACKED).replace(path)
    _log.info("wrote %s", path)


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A new folder beside ``path``, from which what is whole is renamed to ``path``; the rest is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = {"prefix": f".{path.name}.", "dir": path.parent, "ignore_cleanup_errors": True}
    with tempfile.TemporaryDirectory(**beside) as folder:
        yield Path(folder)


def write_contents(folder: Path, *, config: Mapping[str, Any], files: Mapping[str, Path | bytes]) -> None:
    """Write everything of an extracted .nemo but the weights into ``folder``; see :func:`write_nemo`."""
    (folder / CONFIG_NAME).write_text(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
    write_files(folder, files)


def write_files(folder: Path, files: Mapping[str, Path | bytes]) -> None:
    """Write files, or copies of them, into ``folder`` by their names there."""
    for name, content in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if isinstance(content, bytes) else content.read_bytes())


def check_output(path: Path | str, *, overwrite: bool) -> None:
    """Raises UserError where ``write_nemo`` would refuse to write; for use before the work that leads up to
    it.
    """
    as_folder, path = _is_folder(path), Path(path)
    if is_taken(path, overwrite=overwrite) and as_folder and not (path / CONFIG_NAME).is_file():
        raise UserError(
            f"{path} is a folder that is not an extracted .nemo, so it is not overwritten",
            fix="give a file name that ends with .nemo, or a new folder",
        )


def is_taken(path: Path, *, overwrite: bool) -> bool:
    """True if ``path`` is there and no empty folder; UserError where that must not be."""
    taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if taken and not overwrite:
        raise UserError(f"{path} exists", fix="give another output, or add --overwrite")
    return taken


def _is_folder(path: Path | str) -> bool:
    return str(path).endswith("/") or Path(path).is_dir()


@contextlib.contextmanager
def _open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path, "r:*") as tar:
            yield tar
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path} is not a whole tar archive: {error}", fix=_GET_AGAIN) from error


def _checked_members(tar: tarfile.TarFile, path: Path) -> list[tarfile.TarInfo]:
    """The archive's files, or UserError if any member is not a plain file, folder or link within the
    archive.
    """
    members = tar.getmembers()
    _check_end(tar, path)
    for member in members:
        if Path(member.name).is_absolute():
            raise UserError(
                f"{path}: member {member.name!r} is refused: its name is absolute", fix=_GET_AGAIN
            )
        try:
            tarfile.data_filter(member, "/nonexistent")
        except tarfile.FilterError as error:
            raise UserError(f"{path}: member {member.name!r} is refused: {error}", fix=_GET_AGAIN) from error
    needed = sum(member.size for member in members)
    if needed > (free := shutil.disk_usage(tempfile.gettempdir()).free):
        raise UserError(
            f"{path} needs {needed / 1e9:.1f} GB in {tempfile.gettempdir()}, which has {free / 1e9:.1f} GB",
            fix="set TMPDIR to a folder on a larger disk, or extract the file with tar and give the folder",
        )
    return [member for member in members if not member.isdir()]


def _check_end(tar: tarfile.TarFile, path: Path) -> None:
    """A tar that is cut between two members reads without an error; only its end mark is missing."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise UserError(f"{path} is cut short: its last block is missing", fix=_GET_AGAIN)


def _extract(tar: tarfile.TarFile, members: list[tarfile.TarInfo], folder: Path, path: Path) -> None:
    for member in members:
        # A link is followed within the archive and written as a file of its own.
        try:
            source = tar.extractfile(member)
        except (KeyError, RecursionError) as error:
            raise UserError(f"{path}: member {member.name!r} links to nothing", fix=_GET_AGAIN) from error
        if source is None:
            raise UserError(f"{path}: member {member.name!r} is not a file", fix=_GET_AGAIN)
        target = folder / member.name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            stream = target.open("xb")
        except OSError as error:
            raise UserError(
                f"{path}: member {member.name!r} cannot be written: {error}", fix=_GET_AGAIN
            ) from error
        with source, stream:
            shutil.copyfileobj(source, stream, _COPY_BYTES)


def _read_config(folder: Path, source: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise UserError(
            f"{source} holds no {CONFIG_NAME}", fix="give a .nemo file, or the folder it was extracted to"
        )
    return parse_config(path.read_bytes(), source)


def _check_weights_layout(archive: NemoArchive) -> None:
    """Raises UserError unless the weights are a torch_dist checkpoint."""
    # It needs torch, which whoever looks at a config alone need not wait for.
    from nemo_aligner.checkpoint.torch_dist import read_backend

    backend = read_backend(archive.weights)
    if backend == "torch_dist":
        return
    if backend is not None:
        raise UserError(
            f"{archive.source}: the weights are in the {backend} format",
            fix="save it again in the NeMo release that wrote it, with dist_ckpt_format: torch_dist",
        )
    if any(archive.folder.glob("*model_weights.ckpt")) or any(
        archive.folder.glob("*_rank_*/model_weights.ckpt")
    ):
        raise UserError(
            f"{archive.source}: the weights are in NeMo's old layout (model_weights.ckpt)",
            fix=f"convert it: {_CONVERTER} --in-folder {archive.source} --out-file NEW.nemo",
        )
    raise UserError(
        f"{archive.source} holds no {WEIGHTS_NAME}/metadata.json, so it has no weights", fix=_GET_AGAIN
    )


def _pack(staging: Path, target: Path) -> None:
    """Moves the files of ``staging`` into a tar; each is deleted once it is in, so that the disk holds
    little twice.
    """
    paths = sorted(path for path in staging.rglob("*") if path.is_file())
    paths.sort(key=lambda path: path.name != CONFIG_NAME)
    with target.open("wb") as stream:
        with tarfile.open(fileobj=stream, mode="w") as tar:
            for path in paths:
                info = tarfile.TarInfo(path.relative_to(staging).as_posix())
                info.size, info.mtime = path.stat().st_size, int(path.stat().st_mtime)
                with path.open("rb") as source:
                    tar.addfile(info, source)
                path.unlink()
        stream.flush()
        os.fsync(stream.fileno())


def replace_folder(new: Path, path: Path) -> None:
    """Renames ``new`` to ``path``, which it replaces where it exists; both lie in one folder."""
    new.chmod(0o755)
    if not path.exists():
        new.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    path.rename(old / path.name)
    new.rename(path)
    shutil.rmtree(old)
