# SPDX-License-Identifier: Apache-2.0
"""Data sets of rows in tokens: each row of a file is laid out when the file is opened, and again when it is asked for.

A row may make several rows of tokens, or none: what has no room, and what has no loss, is left out whole and counted.
"""

import hashlib
import logging
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Generic, Protocol, TypeVar

from nemo_aligner.data.loader import Rows
from nemo_aligner.data.records import Records
from nemo_aligner.data.row import Row
from nemo_aligner.data.sampler import BlendSource
from nemo_aligner.errors import UserError, located

_LOG = logging.getLogger(__name__)
_LISTED = 10  # lines that a message names

R = TypeVar("R")
R_contra = TypeVar("R_contra", contravariant=True)


class RowLayout(Protocol[R_contra]):
    """Turns one record of a file into tokens and loss masks."""

    @property
    def unit(self) -> str:
        """The name of a record in messages, in the plural."""
        ...

    @property
    def limit(self) -> str:
        """How long a row may be, as messages say it."""
        ...

    @property
    def too_long(self) -> tuple[str, str]:
        """(what is said of records that have no room, its fix)."""
        ...

    def left_out(self, record: R_contra, /) -> str | None:
        """Why nothing can be learned of a record, as a message says it; None where something can.

        Raises:
            UserError: what can be learned of it is not what is asked.
        """
        ...

    def surely_fits(self, record: R_contra, /) -> bool:
        """True where the record makes one row that needs no cut; nothing is tokenised."""
        ...

    def __call__(self, record: R_contra, /) -> list[Row]:
        """The rows of one record; none where it has no room. UserError if it has no loss, or is no record."""
        ...


class RowDataset(Generic[R]):
    """The rows of one file.

    Args:
        records: the file.
        layout: makes rows of a record.
        within: which of the file's records are looked at; None: all.

    Raises:
        UserError: a record cannot be laid out, or no row is left.
    """

    blend: tuple[BlendSource, ...] = ()

    def __init__(self, records: Records[R], layout: RowLayout[R], *, within: range | None = None) -> None:
        self.records, self._layout = records, layout
        self._places = array("Q")  # of each row: its record
        self._parts = array("L")  # and which of the record's rows it is
        self._total = len(records) if within is None else len(within)
        self._left_out: dict[str, list[int]] = {}
        cut = 0
        place = 0
        with located(lambda: f"{records.where(place)}: "):
            for place in range(len(records)) if within is None else within:
                record = records[place]
                why = layout.left_out(record)
                count = 1
                if not why and not layout.surely_fits(record):
                    rows = layout(record)
                    count, cut = len(rows), cut + sum(row.truncated for row in rows)
                    why = None if rows else layout.too_long[0]
                if why:
                    self._left_out.setdefault(why, []).append(place)
                else:
                    self._places.extend([place] * count)
                    self._parts.extend(range(count))
        self._report(cut)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def num_dropped(self) -> int:
        """Records that are left out."""
        return sum(map(len, self._left_out.values()))

    @property
    def fingerprint(self) -> dict[str, object]:
        """A digest of the rows."""
        rows: dict[str, object] = {"rows": self.records.fingerprint}
        if self._places.tolist() == list(range(len(self.records))):
            return rows
        places = hashlib.sha256(self._places.tobytes() + self._parts.tobytes())
        return rows | {"samples": places.hexdigest()[:16]}

    def __getitem__(self, index: int) -> Row:
        place, part = self._places[index], self._parts[index]
        with located(lambda: f"{self.records.where(place)}: "):
            rows = self._layout(self.records[place])
        if part >= len(rows):
            raise UserError(
                f"{self.records.where(place)}: the tokenizer makes more tokens of the text than it has bytes",
                fix="remove the row",
            )
        return rows[part]

    def _report(self, cut: int) -> None:
        path, unit, total = self.records.path, self._layout.unit, self._total
        if not self._places:
            counts = ", ".join(f"{len(places)} {why}" for why, places in self._left_out.items())
            raise UserError(
                f"{path} has nothing to learn: of {total} {unit} {counts}", fix=self._layout.too_long[1]
            )
        for why, places in self._left_out.items():
            named = ", ".join(self.records.where(n).removeprefix(f"{path}, ") for n in places[:_LISTED])
            more = ", ..." if len(places) > _LISTED else ""
            _LOG.info(
                "%s: %d of %d %s %s and are left out: %s%s",
                *(path, len(places), total, unit, why, named, more),
            )
        kept = total - self.num_dropped
        if len(self) > kept:
            _LOG.info(
                "%s: the chat template rewrites earlier turns, so %d rows make %d samples, each with the turns "
                "that share its prompt",
                *(path, kept, len(self)),
            )
        if cut:
            _LOG.info(
                "%s: %d of %d samples are longer than %s and are cut",
                *(path, cut, len(self), self._layout.limit),
            )


class CountedRows(Rows, Protocol):
    """A data set that says what it has left out."""

    @property
    def num_dropped(self) -> int:
        """Records that are left out."""
        ...


class BlendedDataset:
    """The rows of several files, file after file; ``blend`` has the sampler draw from them by weight."""

    def __init__(self, parts: Sequence[CountedRows], weights: Sequence[float]) -> None:
        self._parts = tuple(parts)
        self._stops = tuple(accumulate(map(len, parts)))
        self.blend = tuple(
            BlendSource(num_rows=len(part), weight=weight)
            for part, weight in zip(parts, weights if len(parts) > 1 else (), strict=False)
        )

    def __len__(self) -> int:
        return self._stops[-1]

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self._stops, index)
        return self._parts[part][index - self._stops[part] + len(self._parts[part])]

    @property
    def num_dropped(self) -> int:
        """Records that are left out."""
        return sum(part.num_dropped for part in self._parts)

    @property
    def fingerprint(self) -> dict[str, object]:
        """A digest of the rows."""
        prints = [part.fingerprint for part in self._parts]
        names = dict.fromkeys(("rows", "samples", *(name for found in prints for name in found)))
        return {name: [found.get(name) for found in prints] for name in names}
