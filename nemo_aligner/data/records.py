# SPDX-License-Identifier: Apache-2.0
"""Data files as random-access sequences of typed records. Knows fields; knows no tokens.

A file is read once when it is opened: each row is parsed and checked, and only its place is kept. Rows are
then read from the mapped file when they are asked for.
"""

import hashlib
import itertools
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from nemo_aligner.data.row_files import Place, find_rows, keys_of, map_file, parse_line, shorten
from nemo_aligner.errors import UserError, located

USUAL_REWARDS = (1.0, 0.0)  # of the chosen and of the rejected response, where the data give none

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Records(Protocol[R_co]):
    """The records of one file, in its order."""

    path: Path
    fingerprint: str  # a digest of what the records follow from

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> R_co: ...

    def where(self, index: int) -> str:
        """The place of a record as messages name it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRow:
    """A prompt and the responses to it, as texts; of a pair the chosen response comes first."""

    prompt: str  # empty where the row does not say where the responses begin
    responses: tuple[str, ...] = ()  # none: the prompt is to be answered
    labels: tuple[tuple[float, ...], ...] = ()  # of each response: its attributes, NaN where one is unlabeled
    rewards: tuple[float, ...] = ()  # of each response, where the data give them
    rendered: bool = False  # by a chat template, which writes BOS where the model wants it
    same_context: bool = True  # False: conversations that differ in more than their last turns
    extras: Mapping[str, object] = field(default_factory=dict)  # the JSON object that it stands in

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompt, alone or with each response after it."""
        return tuple(self.prompt + response for response in self.responses) or (self.prompt,)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptResponse:
    """The fields that a prompt template names."""

    fields: Mapping[str, str]
    masked: bool = False  # the row says that nothing of it is learned


class RecordFile(Generic[R]):
    """The records of a file of rows; the file is mapped, not loaded.

    Args:
        path: one JSON object per line, or one JSON array of objects; either may be gzipped.
        read: makes a record of a row; its UserError is reported with file and line.
        most: rows that are read, the first ones; None: all.

    Raises:
        UserError: the file is missing, damaged or empty, or a row is bad.
    """

    def __init__(
        self, path: str | Path, read: Callable[[Mapping[str, object]], R], *, most: int | None = None
    ) -> None:
        self.path = Path(path)
        self._read = read
        self._bytes = map_file(self.path)
        self._starts, self._ends, self._lines = array("Q"), array("Q"), array("Q")
        for place in itertools.islice(self._places(), most):
            self._starts.append(place.start)
            self._ends.append(place.end)
            self._lines.append(place.line)
            try:
                self[-1]
            except UserError as error:
                raise UserError(f"{self.where(-1)}: {error.problem}", fix=error.fix) from error
        if not self._starts:
            raise UserError(f"{self.path} has no rows", fix="give a file with one JSON object per line")
        content = self._bytes if most is None else self._bytes[: self._ends[-1]]
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]  # of all bytes, 1 s per GB

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> R:
        return self._read(parse_line(self._bytes[self._starts[index] : self._ends[index]]))

    def where(self, index: int) -> str:
        """The place of a record as messages name it: ``FILE, line N``."""
        return f"{self.path}, line {self._lines[index]}"

    def _places(self) -> Iterator[Place]:
        with located(lambda: f"{self.path}, "):
            yield from find_rows(self._bytes)


def read_prompt_response(row: Mapping[str, object], *, keys: Sequence[str]) -> PromptResponse:
    """The row's values of ``keys``.

    Raises:
        UserError: the row is a conversation, or a key is missing or its value is not a string.
    """
    turns = sorted({"conversations", "messages"} & row.keys())
    if turns and not row.keys() >= set(keys):
        raise UserError(
            f"the row is a conversation: it has {turns[0]!r}, and not all of {', '.join(keys)}",
            fix="set model.data.chat=True (and model.data.chat_template=tokenizer for the tokenizer's own template)",
        )
    return PromptResponse(fields={key: text_field(row, key) for key in keys})


def text_field(row: Mapping[str, object], key: str) -> str:
    """The string under ``key``; UserError if it is missing, no string, or not to be encoded in UTF-8."""
    if key not in row:
        raise UserError(
            f"key {key!r} is missing; the row has {keys_of(row)}",
            fix=f"add {key!r} to the row; a field that prompt_template names may be changed there",
        )
    value = row[key]
    if not isinstance(value, str):
        raise UserError(f"key {key!r} has the value {shorten(value)}", fix=f"give {key!r} a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"key {key!r} holds half of a surrogate pair, \\u{ord(value[error.start]):04x}, at character "
                f"{error.start + 1}, which is no text",
                fix="write the whole character, or remove it",
            ) from error
    return value
