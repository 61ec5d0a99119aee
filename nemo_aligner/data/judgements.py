# SPDX-License-Identifier: Apache-2.0
"""Files of judged answers: pairs of a better and a worse one, and answers with numbers. Knows no tokens."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from nemo_aligner.data.common_rows import CHATS, Recognised, alpaca_prompt, entries_of, refuse_unread
from nemo_aligner.data.message_rows import render_judged, split_pair
from nemo_aligner.data.records import RecordFile, Records, text_field
from nemo_aligner.data.row_files import keys_of, shorten
from nemo_aligner.data.tokenizer import Tokenizer
from nemo_aligner.errors import UserError

R = TypeVar("R")
P = TypeVar("P", covariant=True)

_LAYOUTS = (
    "write {prompt, chosen, rejected} on each line, "
    "or {text} on alternate lines: the better answer, then the worse one"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two answers to one prompt, the prompt at the start of each."""

    chosen: str
    rejected: str
    rendered: bool = False  # by a chat template, which writes BOS where the model wants it

    @property
    def texts(self) -> tuple[str, ...]:
        """What is to be tokenised."""
        return (self.chosen, self.rejected)

    @property
    def is_idle(self) -> bool:
        """Whether both answers are the same, of which nothing is learned."""
        return self.chosen == self.rejected


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A prompt and its answer, with what people said of them."""

    text: str
    attributes: tuple[float, ...]  # NaN where nobody said anything
    rendered: bool = False  # as a pair's

    @property
    def texts(self) -> tuple[str, ...]:
        """What is to be tokenised."""
        return (self.text,)

    @property
    def is_idle(self) -> bool:
        """Never."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedPair:
    """Two judged answers to one prompt; the first attribute of both says which is better and by how much."""

    first: Judged
    second: Judged

    @property
    def texts(self) -> tuple[str, ...]:
        """What is to be tokenised."""
        return (self.first.text, self.second.text)

    @property
    def rendered(self) -> bool:
        """As a pair's."""
        return self.first.rendered

    @property
    def is_idle(self) -> bool:
        """Whether both answers are the same."""
        return self.first.text == self.second.text


class Grouped(Generic[R, P]):
    """Consecutive lines of a file as one record.

    Args:
        lines: the file.
        size: lines of a record, 1 or 2.
        join: makes a record of them; its UserError is reported by whoever asks for the record.

    Raises:
        UserError: the last record lacks a line.
    """

    def __init__(self, lines: RecordFile[R], *, size: int, join: Callable[[Sequence[R]], P]) -> None:
        if len(lines) % size:
            raise UserError(
                f"{lines.where(len(lines) - 1)}: two lines make a pair, and the last of {len(lines)} has no other",
                cure="add the other answer of its pair, or remove the line",
            )
        self._lines, self._size, self._join = lines, size, join

    def __len__(self) -> int:
        return len(self._lines) // self._size

    def __getitem__(self, index: int) -> P:
        first = index * self._size
        return self._join([self._lines[i] for i in range(first, first + self._size)])

    @property
    def path(self) -> Path:
        """The file."""
        return self._lines.path

    @property
    def fingerprint(self) -> str:
        """As the file's."""
        return self._lines.fingerprint

    def where(self, index: int) -> str:
        """The place of a record as messages name it, that of its first line."""
        return self._lines.where(index * self._size)


def open_pairs(path: str | Path, tokenizer: Tokenizer | None = None) -> Records[Pair]:
    """The pairs of a file whose first row says how all of them are written.

    Rows are {prompt, chosen, rejected}, where a text is the prompt with the answer after it, or where the three
    are messages that the chat template lays out; or {text} on alternate lines, the better answer first.

    Args:
        path: the file.
        tokenizer: lays out messages; None where there are none.

    Raises:
        UserError: the file or a line cannot be read, a row is not like the first one, or a line is left over.
    """
    reader = _PairReader(path, tokenizer)
    lines = RecordFile(path, reader)
    return Grouped(lines, size=2 if reader.alternates else 1, join=_join_pair)


def open_judged(
    path: str | Path, *, num_attributes: int, missing: float, tokenizer: Tokenizer | None = None
) -> Records[Judged]:
    """The rows {"text": ..., "label": [numbers]} of a file; ``messages`` may stand in the place of ``text``.

    Args:
        path: the file.
        num_attributes: numbers in each label.
        missing: stands in a label for an attribute that nobody judged, usually -100.
        tokenizer: lays out messages; None where there are none.

    Raises:
        UserError: the file or a line cannot be read.
    """
    return RecordFile(
        path, _JudgedReader(num_attributes=num_attributes, missing=missing, tokenizer=tokenizer)
    )


def open_judged_pairs(
    path: str | Path, *, num_attributes: int, missing: float, tokenizer: Tokenizer | None = None
) -> Records[JudgedPair]:
    """As ``open_judged``, where two consecutive rows are the answers to one prompt.

    The first number of both labels is the preference: below 0 the first answer is better, else the second;
    its size is by how much.

    Raises:
        UserError: as ``open_judged``, or a line is left over.
    """
    lines = RecordFile(
        path, _JudgedReader(num_attributes=num_attributes, missing=missing, tokenizer=tokenizer)
    )
    return Grouped(lines, size=2, join=_join_judged)


def check_first_pairs(path: str | Path, *, most: int) -> None:
    """Read the first rows of a file as ``open_pairs`` will; messages are left to it, as they need a tokenizer.

    Raises:
        UserError: the file or a row cannot be read.
    """
    reader = _PairReader(path, None, quiet=True)
    RecordFile(path, lambda row: None if _has_messages(row) else reader(row), most=most)


def _has_messages(row: Mapping[str, object]) -> bool:
    return any(isinstance(row.get(key), list | dict) for key in ("prompt", "chosen", "rejected", *CHATS))


class _PairReader:
    """Reads a line's pair, or one text of a pair that takes two lines; which, the first line decides."""

    def __init__(self, path: str | Path, tokenizer: Tokenizer | None, *, quiet: bool = False) -> None:
        self.alternates: bool | None = None
        self._tokenizer = tokenizer
        self._recognised = Recognised(path, quiet=quiet)

    def __call__(self, row: Mapping[str, object]) -> Pair | str:
        alternates = _alternates(row)
        if self.alternates is None:
            self.alternates = alternates
        if alternates != self.alternates:
            raise UserError(
                f"the row has {keys_of(row)}, unlike the file's first one",
                cure=f"{_LAYOUTS}; not both in one file",
            )
        refuse_unread(
            row, read=("system", "tools", "instruction"), cure="write it into the texts, or as messages"
        )
        if alternates:
            refuse_unread(row, read=(), cure="write it into the text")
            return text_field(row, "text")
        if _has_messages(row):
            return self._of_messages(row)
        refuse_unread(
            row, read=("instruction",), cure="write it into the prompt, or write the row as messages"
        )
        if "prompt" not in row:
            self._recognised.say(
                "rows of {instruction, input, chosen, rejected}",
                "Alpaca's: instruction and input in its prompt",
            )
        prompt = text_field(row, "prompt") if "prompt" in row else f"{alpaca_prompt(row)} "
        return Pair(chosen=prompt + text_field(row, "chosen"), rejected=prompt + text_field(row, "rejected"))

    def _of_messages(self, row: Mapping[str, object]) -> Pair:
        self._recognised.say(
            "rows of {prompt, chosen, rejected} with messages", "conversations, laid out by the chat template"
        )
        chosen, rejected = (render_judged(self._tokenizer, entries, row) for entries in split_pair(row))
        return Pair(chosen=chosen, rejected=rejected, rendered=True)


def _alternates(row: Mapping[str, object]) -> bool:
    if {"chosen", "rejected"} <= row.keys():
        written = [row[key] for key in ("chosen", "rejected")]
        if row.keys() & {"prompt", "instruction", *CHATS} or any(isinstance(text, list) for text in written):
            return False
        raise UserError(
            "key 'prompt' is missing beside 'chosen' and 'rejected'",
            cure="add the prompt; rows of Anthropic HH are converted by "
            "examples/nlp/data/anthropic_hh/download_and_process.py",
        )
    if "text" in row:
        return True
    raise UserError(f"the row is no pair and no text; it has {keys_of(row)}", cure=_LAYOUTS)


def _join_pair(lines: Sequence[Pair | str]) -> Pair:
    match lines:
        case [Pair() as pair]:
            return pair
        case [str(chosen), str(rejected)]:
            return Pair(chosen=chosen, rejected=rejected)
    raise AssertionError(lines)


def _join_judged(lines: Sequence[Judged]) -> JudgedPair:
    first, second = lines
    if not first.attributes[0] == second.attributes[0]:  # NaN differs from itself
        raise UserError(
            f"the first numbers of the labels of a pair are {first.attributes[0]:g} and {second.attributes[0]:g}",
            cure="give both answers the same preference: below 0 if the first is better, else above 0",
        )
    if first.rendered != second.rendered:
        raise UserError("of a pair one is a text and the other has messages", cure="write both alike")
    return JudgedPair(first=first, second=second)


@dataclass(frozen=True, slots=True, kw_only=True)
class _JudgedReader:
    num_attributes: int
    missing: float
    tokenizer: Tokenizer | None

    def __call__(self, row: Mapping[str, object]) -> Judged:
        key = next((key for key in CHATS if key in row), None)
        refuse_unread(
            row, read=("system", "tools") if key else (), cure="write it into the text, or into messages"
        )
        text = render_judged(self.tokenizer, entries_of(row, key), row) if key else text_field(row, "text")
        label = row.get("label")
        if not (isinstance(label, list) and label and all(map(_is_finite_number, label))):
            raise UserError(
                f"key 'label' is {shorten(label)}" if "label" in row else "key 'label' is missing",
                cure=f"give it a list of {self.num_attributes} numbers, {self.missing:g} for what was not judged",
            )
        if len(label) != self.num_attributes:
            raise UserError(
                f"key 'label' has {len(label)} numbers, but model.regression.num_attributes={self.num_attributes}",
                cure=f"set model.regression.num_attributes={len(label)}, if all rows have so many",
            )
        attributes = tuple(math.nan if number == self.missing else float(number) for number in label)
        if all(map(math.isnan, attributes)):
            raise UserError(
                f"every number of key 'label' is {self.missing:g}, so nothing is learned of the row",
                cure="remove the row, or set model.regression.loss_mask_val to what marks a missing number",
            )
        return Judged(text=text, attributes=attributes, rendered=key is not None)


def _is_finite_number(value: object) -> bool:
    # An int may be larger than any float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
