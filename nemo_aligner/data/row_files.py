# SPDX-License-Identifier: Apache-2.0
"""Where the rows of a data file lie, and one row as a JSON object. Knows bytes and JSON; knows no field.

A file holds one JSON object per line, or is one JSON array of objects; either may be gzipped. Lines end at
"\\n" alone: every other character that Unicode calls a line end is content.
"""

import gzip
import json
import mmap
import os
import re
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nemo_aligner.data.hub import is_dataset, rows_file
from nemo_aligner.errors import UserError

_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"
_DEEPEST = 100  # brackets within brackets; far below where Python's own parser gives up
_LONGEST_SHOWN = 60  # characters of a bad value in a message
_LONGEST_LIST = 400  # characters of a row's keys
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)
_OTHER_FORMATS = {
    b"PAR1": ("a Parquet file", "python -c \"import pandas; pandas.read_parquet('IN').to_json('OUT.jsonl', "
              "orient='records', lines=True)\""),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "unzstd FILE"),
    b"\xfd7zXZ": ("compressed by xz", "unxz -k FILE"),
    b"BZh": ("compressed by bzip2", "bunzip2 -k FILE"),
    b"PK\x03\x04": ("a zip archive", "unzip FILE"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """One row of a file."""

    start: int  # bytes from the file's start
    end: int
    line: int  # where it begins, from 1


def map_file(path: Path) -> mmap.mmap | bytes:
    """The content of a file, unpacked if it is gzipped; it is mapped, not loaded.

    Raises:
        UserError: there is no such file, it cannot be read, or it is in another format.
    """
    try:
        if is_dataset(path):
            path = rows_file(path)
        if not path.is_file():
            raise UserError(
                f"there is no data file {path}", fix="set the path under model.data to a JSONL file"
            )
        with path.open("rb") as file:
            head = file.read(8)
            file.seek(0)
            for magic, (kind, fix) in _OTHER_FORMATS.items():
                if head.startswith(magic):
                    raise UserError(f"{path} is {kind}, not JSONL", fix=fix)
            if not head.startswith(b"\x1f\x8b"):
                return _mapped(file)
            with tempfile.TemporaryFile(prefix="nemo_aligner_") as plain:
                _unpack(path, plain)
                return _mapped(plain)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror or error}", fix=f"chmod +r {path}"
        ) from error


def _mapped(file: IO[bytes]) -> mmap.mmap | bytes:
    # An empty file cannot be mapped.
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""


def _unpack(path: Path, plain: IO[bytes]) -> None:
    """Into a file without a name: rows are read in any order."""
    try:
        with gzip.open(path) as packed:
            shutil.copyfileobj(packed, plain, 1 << 20)
        plain.flush()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} is not a whole gzip file: {error}", fix="get or write the file again"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be unpacked into {tempfile.gettempdir()}: {error.strerror}",
            fix=f"set TMPDIR to a folder with more room, or gunzip -k {path}",
        ) from error


def find_rows(content: mmap.mmap | bytes) -> Iterator[Place]:
    """Where the rows are: the lines that are not blank, or the entries of the one array that the file is.

    Raises:
        UserError: an array that does not end, or that is not all of the file; the message begins with the line.
    """
    first = len(_BOM) if content[: len(_BOM)] == _BOM else 0
    while first < len(content) and content[first] in _SPACE:
        first += 1
    return _entries(content, first) if content[first : first + 1] == b"[" else _lines(content)


def _lines(content: mmap.mmap | bytes) -> Iterator[Place]:
    start, number = 0, 0
    while start < len(content):
        end = content.find(b"\n", start)
        end = len(content) if end < 0 else end
        number += 1
        if content[start:end].removeprefix(_BOM if number == 1 else b"").strip(_SPACE):
            yield Place(start, end, number)
        start = end + 1


def _entries(content: mmap.mmap | bytes, first: int) -> Iterator[Place]:
    depth, begin, line, counted, end = 0, first + 1, 1, 0, None
    for token in _TOKEN.finditer(content, first):
        kind = content[token.start() : token.start() + 1]
        if kind == b'"':
            if token.end() - token.start() == 1:
                break  # a string that does not end
            continue
        depth += (kind in b"[{") - (kind in b"]}")
        if depth > 1 or kind not in b",]}" or (depth == 1 and kind != b","):
            continue
        while begin < token.start() and content[begin] in _SPACE:
            begin += 1
        line += content[counted:begin].count(b"\n")
        is_empty_array = counted == 0 and begin == token.start() and depth == 0
        counted = begin
        if not is_empty_array:
            yield Place(begin, token.start(), line)
        begin = token.end()
        if depth == 0:
            end = token.end()
            break
    line += content[counted:].count(b"\n")
    if end is None:
        raise UserError(
            f"line {line}: the JSON array that begins the file does not end",
            fix="write the file again, whole",
        )
    if content[end:].strip(_SPACE):
        raise UserError(
            f"line {line}: something follows the JSON array that begins the file",
            fix="give one array of JSON objects, or one JSON object on each line",
        )


def parse_line(line: bytes) -> Mapping[str, object]:
    """One JSON object.

    Raises:
        UserError: not UTF-8, not JSON, not an object, nested too deeply, or a key is there twice.
    """
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text ({error.reason})", fix="save the file as UTF-8") from error
    if _is_deep(line):
        raise UserError(
            f"brackets are nested more than {_DEEPEST} deep: {shorten(text.strip())}",
            fix="leave out what is so deep, or write it as a string",
        )
    try:
        row = _DECODE(text)
    except UserError:
        raise
    except json.JSONDecodeError as error:
        raise UserError(
            f"not JSON ({error.msg} at column {error.colno}): {shorten(text.strip())}",
            fix="write one whole JSON object on each line",
        ) from error
    except ValueError as error:
        raise UserError(
            f"a number has more digits than Python reads: {shorten(text.strip())}",
            fix="write it as a string, or leave it out",
        ) from error
    if not isinstance(row, dict):
        raise UserError(
            f"not a JSON object but {type(row).__name__}: {shorten(row)}",
            fix="write one JSON object on each line",
        )
    return row


def _is_deep(line: bytes) -> bool:
    if line.count(b"[") + line.count(b"{") <= _DEEPEST:
        return False
    depth = 0
    for token in _TOKEN.finditer(line):
        kind = line[token.start() : token.start() + 1]
        depth += (kind in b"[{") - (kind in b"]}")
        if depth > _DEEPEST:
            return True
    return False


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise UserError(f"key {shorten(twice)!r} is there twice", fix="leave one of them")
    return row


_DECODE = json.JSONDecoder(object_pairs_hook=_distinct).decode


def shorten(value: object) -> str:
    """The beginning of a value, as messages show it: text that any file can hold."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
    except (ValueError, RecursionError):
        text = type(value).__name__
    text = text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + " ..."
    return text.encode("utf-8", "backslashreplace").decode()


def keys_of(row: Mapping[str, object]) -> str:
    """The keys of a row, as messages show them."""
    text = str(sorted(row))
    return text if len(text) <= _LONGEST_LIST else text[:_LONGEST_LIST] + " ..."
