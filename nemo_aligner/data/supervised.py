# SPDX-License-Identifier: Apache-2.0
"""The samples of a file of conversations or of prompts and responses. Every row is laid out when the file is opened."""

import hashlib
import logging
from array import array
from typing import Generic, Protocol, TypeVar

from nemo_aligner.data.records import RecordFile
from nemo_aligner.data.sample import Sample
from nemo_aligner.errors import UserError

_LOG = logging.getLogger(__name__)
_LISTED = 10  # lines that a message names


class Row(Protocol):
    """A record that may be learned."""

    @property
    def masked(self) -> bool:
        """Whether the row says itself that nothing of it is learned."""
        ...


R = TypeVar("R", bound=Row)
R_contra = TypeVar("R_contra", bound=Row, contravariant=True)


class Layout(Protocol[R_contra]):
    """Turns one record into tokens and mask."""

    def __call__(self, record: R_contra, /) -> list[Sample]:
        """The samples of one record; none where it leaves no room; UserError if nothing in it is learned."""
        ...

    def surely_fits(self, record: R_contra, /) -> bool:
        """Whether the record makes one sample that needs no cut, told without tokenising it."""
        ...


class SFTDataset(Generic[R]):
    """Samples of a record file: each row is laid out once when the file is opened, and again when it is asked for.

    A row may make several samples, or none: a row that leaves no room for its response, or says that it is not
    learned, is left out and counted.

    Args:
        records: the file.
        layout: makes samples of a record.
        max_seq_length: tokens of the longest sample, for messages.

    Raises:
        UserError: a row cannot be laid out, or none is left.
    """

    def __init__(self, records: RecordFile[R], layout: Layout[R], *, max_seq_length: int) -> None:
        self.records = records
        self._layout = layout
        self._rows = array("Q")  # of each sample
        self._parts = array("L")  # which of its row's samples it is
        self.num_cut = 0
        too_long, masked = array("Q"), array("Q")
        for row in range(len(records)):
            record = records[row]
            if record.masked:
                masked.append(row)
                continue
            if layout.surely_fits(record):
                self._add(row, 1)
                continue
            samples = self._lay_out(row, record)
            self.num_cut += sum(sample.truncated for sample in samples)
            self._add(row, len(samples))
            if not samples:
                too_long.append(row)
        self._report(too_long, masked, max_seq_length)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def fingerprint(self) -> dict[str, object]:
        """What the samples follow from."""
        rows: dict[str, object] = {"rows": self.records.fingerprint}
        if self._rows.tolist() == list(range(len(self.records))):
            return rows
        places = hashlib.sha256(self._rows.tobytes() + self._parts.tobytes())
        return rows | {"samples": places.hexdigest()[:16]}

    def __getitem__(self, index: int) -> Sample:
        """One sample."""
        return self._lay_out(self._rows[index])[self._parts[index]]

    def _add(self, row: int, count: int) -> None:
        self._rows.extend([row] * count)
        self._parts.extend(range(count))

    def _lay_out(self, row: int, record: R | None = None) -> list[Sample]:
        """The samples of a row, whose record is read unless it is given."""
        try:
            return self._layout(self.records[row] if record is None else record)
        except UserError as error:
            raise UserError(f"{self.records.where(row)}: {error.problem}", cure=error.cure) from error

    def _report(self, too_long: array, masked: array, max_seq_length: int) -> None:
        path, total = self.records.path, len(self.records)
        if not self._rows:
            raise UserError(
                f"{path} has nothing to learn: {len(too_long)} of {total} rows leave no room for a response within "
                f"max_seq_length={max_seq_length}, {len(masked)} say that they are not learned",
                cure="raise max_seq_length, or give rows that are learned",
            )
        for rows, why in (
            (too_long, f"leave no room for a response within max_seq_length={max_seq_length}"),
            (masked, "say that they are not learned (weight or train)"),
        ):
            if rows:
                named = ", ".join(self.records.where(row).removeprefix(f"{path}, ") for row in rows[:_LISTED])
                more = ", ..." if len(rows) > _LISTED else ""
                _LOG.info(
                    "%s: %d of %d rows %s and are left out: %s%s", path, len(rows), total, why, named, more
                )
        if len(self._rows) > total - len(too_long) - len(masked):
            _LOG.info(
                "%s: the chat template rewrites earlier turns, so %d rows make %d samples, each with the turns "
                "that share its prompt",
                *(path, total - len(too_long) - len(masked), len(self._rows)),
            )
        if self.num_cut:
            _LOG.info(
                "%s: %d of %d samples are longer than max_seq_length=%d and are cut",
                *(path, self.num_cut, len(self._rows), max_seq_length),
            )
