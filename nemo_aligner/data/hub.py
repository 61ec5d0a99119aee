# SPDX-License-Identifier: Apache-2.0
"""Data sets of the Hugging Face hub, or folders of them, as files of JSON lines; needs ``nemo-aligner[datasets]``.

A name is OWNER/NAME or a folder, with :SPLIT behind it where the split is not "train", or :CONFIGURATION:SPLIT. The
rows are written once, into the hub's cache, and mapped from there as any file is.
"""

import functools
import hashlib
import os
import re
from pathlib import Path

from nemo_aligner.errors import UserError, report_damage

_NAME = re.compile(
    r"(?P<source>.+?)(?::(?:(?P<configuration>[\w.-]+):)?(?P<split>[\w.\[\]%:+-]+))?", re.DOTALL
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = (
    ".json", ".jsonl", ".gz", ".zst", ".xz", ".bz2", ".zip", ".txt", ".npy", ".bin", ".idx", ".parquet", ".csv", ".tsv",
    ".nemo", ".gguf", ".safetensors", ".yaml", ".pt",
)  # fmt: skip


def is_dataset(path: str | Path) -> bool:
    """True for a data set, of the hub or in a folder that has files, and False for a file."""
    if Path(path).is_file():
        return False
    source, _, _ = _parts(path)
    folder = Path(source)
    if folder.is_dir():
        return any(folder.iterdir())
    return bool(_HUB_ID.fullmatch(source) and not source.endswith(_FILES))


def rows_file(path: str | Path) -> Path:
    """The file with the rows of a data set.

    Raises:
        UserError: it cannot be read, has no such split, or the package is not installed.
    """
    source, configuration, split = _parts(path)
    folder = Path(source) if Path(source).is_dir() else _downloaded(source)
    found = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in found]
    digest = hashlib.sha256(repr((str(folder.resolve()), state, configuration, split)).encode()).hexdigest()[
        :16
    ]
    from huggingface_hub.constants import HF_HOME

    target = Path(HF_HOME) / "nemo_aligner" / f"{Path(source).name}-{digest}.jsonl"
    if not target.exists():
        _write(folder, (configuration, split), target, f"{path}")
    return target


def _parts(path: str | Path) -> tuple[str, str | None, str]:
    """(Name or folder, configuration, split)."""
    found = _NAME.fullmatch(str(path))
    return (
        (found["source"], found["configuration"], found["split"] or "train")
        if found
        else (str(path), None, "train")
    )


@functools.cache  # the hub is asked once, however often the data set is opened
def _downloaded(name: str) -> Path:
    with report_damage(
        f"{name} is no file or folder here, and cannot be downloaded from the Hugging Face hub",
        fix="give a file of JSON lines, or the OWNER/NAME of a data set of the hub, where the machine is online or has "
        "it in its cache, and log in (hf auth login) if its owner asks for that",
    ):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, repo_type="dataset"))


def _write(folder: Path, part: tuple[str | None, str], target: Path, name: str) -> None:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{name} is a data set, and its files are read by datasets, which is not installed",
            fix="pip install 'nemo-aligner[datasets]', or give a file of JSON lines",
        ) from error
    with report_damage(
        f"{name} cannot be read as a data set",
        fix="name a split that it has, OWNER/NAME:SPLIT, or OWNER/NAME:CONFIGURATION:SPLIT, or one of its files",
    ):
        rows = datasets.load_dataset(str(folder), part[0], split=part[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_suffix(f".{os.getpid()}.tmp")
    rows.to_json(fresh, force_ascii=False)
    fresh.replace(target)
