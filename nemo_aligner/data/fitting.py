# SPDX-License-Identifier: Apache-2.0
"""Data sets of texts that all fit: what is too long is left out whole and counted. Knows no layout of files."""

import hashlib
import logging
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Generic, Protocol, TypeVar

from nemo_aligner.data.records import Records
from nemo_aligner.data.sample import TextEncoder
from nemo_aligner.data.sampler import Share
from nemo_aligner.errors import UserError

_LOG = logging.getLogger(__name__)
_CERTAINLY_ENOUGH = 64  # bytes of a text that is taken to have enough tokens without a look


class Texts(Protocol):
    """A record that is some texts, and perhaps more."""

    @property
    def texts(self) -> tuple[str, ...]:
        """What is to be tokenised."""
        ...

    @property
    def rendered(self) -> bool:
        """Whether a chat template wrote the texts."""
        ...

    @property
    def is_idle(self) -> bool:
        """Whether nothing can be learned of the record."""
        ...


T = TypeVar("T", bound=Texts)
S = TypeVar("S")


class FittingDataset(Generic[T, S]):
    """The records of one file whose texts all fit; the others are left out whole and counted.

    Args:
        records: the file.
        rows: which of its records are looked at.
        encode: makes tokens of a text.
        build: makes a sample of a record and the tokens of its texts.
        lengths: how many tokens a text may have.
        unit: what a record is called in messages, in the plural.

    Raises:
        UserError: a record cannot be read or has too few tokens, or none is left.
    """

    def __init__(
        self,
        records: Records[T],
        rows: range,
        *,
        encode: TextEncoder,
        build: Callable[[T, Sequence[list[int]]], S],
        lengths: range,
        unit: str,
    ) -> None:
        self._records, self._encode, self._build, self._lengths = records, encode, build, lengths
        self._num_idle = 0
        self._kept = array("Q", (row for row in rows if self._is_kept(row)))
        self.num_dropped = len(rows) - len(self._kept)
        if self._num_idle:
            _LOG.info(
                "%s: %d of %d %s are of the same text twice, which teaches nothing, and are left out",
                *(records.path, self._num_idle, len(rows), unit),
            )
        if not self._kept:
            raise UserError(
                f"none of {len(rows)} {unit} of {records.path} has at most {lengths[-1]} tokens"
                + (" and two different texts" if self._num_idle else ""),
                cure="raise model.data.seq_length or model.encoder_seq_length, or give shorter texts",
            )
        if num_long := self.num_dropped - self._num_idle:
            _LOG.info(
                "%s: %d of %d %s have more than %d tokens and are left out",
                *(records.path, num_long, len(rows), unit, lengths[-1]),
            )

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def fingerprint(self) -> dict[str, object]:
        """What the rows follow from."""
        kept = hashlib.sha256(self._kept.tobytes()).hexdigest()[:16]
        return {"rows": self._records.fingerprint, "kept": kept}

    def __getitem__(self, index: int) -> S:
        """The sample of one record."""
        row = self._kept[index]
        record = self._read(row)
        tokens = self._tokens(row, record)
        if max(map(len, tokens)) > self._lengths[-1]:
            raise UserError(
                f"{self._records.where(row)}: the tokenizer makes more tokens of the text than it has bytes",
                cure="remove the row",
            )
        return self._build(record, tokens)

    def _is_kept(self, row: int) -> bool:
        record = self._read(row)
        self._num_idle += record.is_idle
        return not record.is_idle and self._fits(row, record)

    def _fits(self, row: int, record: T) -> bool:
        bounds = [self._encode.at_most(text) for text in record.texts]
        if all(_CERTAINLY_ENOUGH <= bound <= self._lengths[-1] for bound in bounds):
            return True
        return all(len(ids) <= self._lengths[-1] for ids in self._tokens(row, record))

    def _read(self, row: int) -> T:
        try:
            return self._records[row]
        except UserError as error:
            raise UserError(f"{self._records.where(row)}: {error.problem}", cure=error.cure) from error

    def _tokens(self, row: int, record: T) -> list[list[int]]:
        tokens = [self._encode(text, rendered=record.rendered) for text in record.texts]
        if min(map(len, tokens)) < self._lengths[0]:
            raise UserError(
                f"{self._records.where(row)}: a text has {min(map(len, tokens))} tokens, "
                f"and {self._lengths[0]} are the fewest",
                cure="write a longer text, or remove the row",
            )
        return tokens


class JoinedDataset(Generic[T, S]):
    """The rows of several files, file after file; ``blend`` tells a sampler how to draw from them by weight."""

    def __init__(self, parts: Sequence[FittingDataset[T, S]], weights: Sequence[float]) -> None:
        self._parts = tuple(parts)
        self._stops = tuple(accumulate(map(len, parts)))
        self.blend = tuple(
            Share(num_rows=len(part), weight=weight)
            for part, weight in zip(parts, weights if len(parts) > 1 else (), strict=False)
        )

    def __len__(self) -> int:
        return self._stops[-1]

    def __getitem__(self, index: int) -> S:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self._stops, index)
        return self._parts[part][index - self._stops[part] + len(self._parts[part])]

    @property
    def num_dropped(self) -> int:
        """Records that were left out because they are too long."""
        return sum(part.num_dropped for part in self._parts)

    @property
    def fingerprint(self) -> dict[str, object]:
        """What the rows follow from."""
        prints = [part.fingerprint for part in self._parts]
        return {name: [found[name] for found in prints] for name in prints[0]}
