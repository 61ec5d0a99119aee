# SPDX-License-Identifier: Apache-2.0
"""JSONL files as random-access sequences of typed records. Knows files and fields; knows no tokens.

A file is read once when it is opened: each line is parsed and checked, and only its place is kept. Rows are
then read from the mapped file when they are asked for.
"""

import hashlib
import json
import mmap
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from nemo_aligner.errors import UserError

__all__ = [
    "PromptResponse",
    "PromptText",
    "RecordFile",
    "Records",
    "parse_line",
    "read_prompt_response",
    "read_prompt_text",
    "shorten",
    "text_field",
]

_DIGESTED = 1 << 20  # bytes at either end of a file that its fingerprint looks at
_LONGEST_SHOWN = 60  # characters of a bad value in a message

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Records(Protocol[R_co]):
    """The records of one file, in its order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> R_co: ...

    @property
    def path(self) -> Path:
        """The file."""
        ...

    @property
    def fingerprint(self) -> str:
        """A digest of what the records follow from."""
        ...

    def where(self, index: int) -> str:
        """The place of a record as messages name it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptText:
    """A prompt, to be answered by a model."""

    text: str

    @property
    def texts(self) -> tuple[str, ...]:
        """What is to be tokenised."""
        return (self.text,)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptResponse:
    """The fields that a prompt template names."""

    fields: Mapping[str, str]


class RecordFile(Generic[R]):
    """The records of a JSONL file; the file is mapped, not loaded.

    Args:
        path: the file, one JSON object per line; blank lines are passed over.
        read: makes a record of a parsed line; its UserError is reported with file and line.

    Raises:
        UserError: the file is missing, compressed or empty, or a line is bad.
    """

    def __init__(self, path: str | Path, read: Callable[[Mapping[str, object]], R]) -> None:
        self.path = Path(path)
        self._read = read
        self._bytes = _map(self.path)
        self._starts = array("Q")  # byte offset of each record
        self._lines = array("Q")  # its line number, from 1
        for start, number, line in self._scan():
            try:
                read(parse_line(line))
            except UserError as error:
                raise UserError(f"{self.path}, line {number}: {error.problem}", cure=error.cure) from error
            self._starts.append(start)
            self._lines.append(number)
        if not self._starts:
            raise UserError(f"{self.path} has no rows", cure="give a file with one JSON object per line")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> R:
        start = self._starts[index]
        end = self._bytes.find(b"\n", start)
        line = self._bytes[start : end if end >= 0 else len(self._bytes)]
        return self._read(parse_line(line))

    @property
    def fingerprint(self) -> str:
        """A digest of the file's size, first and last bytes, and of where its rows start."""
        digest = hashlib.sha256(str(len(self._bytes)).encode())
        digest.update(self._bytes[:_DIGESTED])
        digest.update(self._bytes[-_DIGESTED:])
        digest.update(self._starts.tobytes())
        return digest.hexdigest()[:16]

    def where(self, index: int) -> str:
        """The place of a record as messages name it: ``FILE, line N``."""
        return f"{self.path}, line {self._lines[index]}"

    def _scan(self) -> Iterator[tuple[int, int, bytes]]:
        start, number = 0, 0
        while start < len(self._bytes):
            end = self._bytes.find(b"\n", start)
            end = len(self._bytes) if end < 0 else end
            line = self._bytes[start:end]
            number += 1
            if line.strip():
                yield start, number, line
            start = end + 1


def parse_line(line: bytes) -> Mapping[str, object]:
    """One JSON object.

    Raises:
        UserError: not UTF-8, not JSON, or not an object.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text ({error.reason})", cure="save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        shown = shorten(line.decode("utf-8-sig").strip())
        raise UserError(
            f"not JSON ({error.msg} at column {error.colno}): {shown}",
            cure="write one whole JSON object on each line",
        ) from error
    if not isinstance(row, dict):
        raise UserError(
            f"not a JSON object but {type(row).__name__}: {shorten(row)}",
            cure="write one JSON object on each line",
        )
    return row


def read_prompt_response(row: Mapping[str, object], *, keys: Sequence[str]) -> PromptResponse:
    """The row's values of ``keys``.

    Raises:
        UserError: the row is a conversation, or a key is missing or its value is not a string.
    """
    turns = sorted({"conversations", "messages"} & row.keys())
    if turns and not row.keys() >= set(keys):
        raise UserError(
            f"the row is a conversation: it has {turns[0]!r}, and not all of {', '.join(keys)}",
            cure="set model.data.chat=True (and model.data.chat_template=tokenizer for the tokenizer's own template)",
        )
    return PromptResponse(fields={key: text_field(row, key) for key in keys})


def read_prompt_text(row: Mapping[str, object]) -> PromptText:
    """The prompt of a row {"text": ...}; UserError if it is missing or no string."""
    return PromptText(text=text_field(row, "text"))


def text_field(row: Mapping[str, object], key: str) -> str:
    """The string under ``key``; UserError if it is missing or no string."""
    if key not in row:
        raise UserError(
            f"key {key!r} is missing; the row has {sorted(row)}",
            cure=f"add {key!r} to the row; a field that prompt_template names may be changed there",
        )
    value = row[key]
    if not isinstance(value, str):
        raise UserError(f"key {key!r} has the value {shorten(value)}", cure=f"give {key!r} a string")
    return value


def _map(path: Path) -> mmap.mmap | bytes:
    if not path.is_file():
        raise UserError(f"there is no data file {path}", cure="set the path under model.data to a JSONL file")
    if path.suffix == ".gz":
        raise UserError(f"{path} is compressed, and rows are read in any order", cure=f"gunzip -k {path}")
    try:
        with path.open("rb") as file:
            # An empty file cannot be mapped.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", cure=f"chmod +r {path}") from error


def shorten(value: object) -> str:
    """A value as messages show it: its beginning."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + " ..."
