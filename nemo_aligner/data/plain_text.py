# SPDX-License-Identifier: Apache-2.0
"""Documents of plain text, all of whose tokens are learned: continued pre-training."""

import hashlib
import logging
import mmap
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path

from nemo_aligner.data.conversations import is_trained
from nemo_aligner.data.records import RecordFile, Records, text_field
from nemo_aligner.data.row import Row, TextEncoder, finish
from nemo_aligner.data.row_files import map_file
from nemo_aligner.data.sampler import BlendSource
from nemo_aligner.errors import UserError, located

_LOG = logging.getLogger(__name__)
_SEPARATOR = b"<|endoftext|>"  # between the documents of a .txt file


class TextFile:
    """The documents of a .txt file, which ``<|endoftext|>`` stands between; the file is mapped, not loaded.

    Raises:
        UserError: the file is missing or damaged, holds no text, or is not in UTF-8.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._bytes = map_file(self.path)
        self.fingerprint = hashlib.sha256(self._bytes).hexdigest()[:16]
        self._starts, self._ends, self._lines = array("Q"), array("Q"), array("Q")
        line = 1
        for start, end in _parts(self._bytes):
            part = self._bytes[start:end]
            try:
                text = part.decode()
            except UnicodeDecodeError as error:
                raise UserError(f"{self.path} is not in UTF-8: {error}", fix="convert it to UTF-8") from error
            if text.strip():
                self._starts.append(start)
                self._ends.append(end)
                self._lines.append(line + _blank_lines(part))
            line += part.count(b"\n")
        if not self._starts:
            raise UserError(f"{self.path} holds no text", fix="give a file with text")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> str:
        return self._bytes[self._starts[index] : self._ends[index]].decode().strip()

    def where(self, index: int) -> str:
        """The place of a document as messages name it."""
        return f"{self.path}, line {self._lines[index]}"


def _parts(content: mmap.mmap | bytes) -> Iterator[tuple[int, int]]:
    """Where each part between separators begins and ends."""
    start = 0
    while (end := content.find(_SEPARATOR, start)) >= 0:
        yield start, end
        start = end + len(_SEPARATOR)
    yield start, len(content)


def _blank_lines(part: bytes) -> int:
    """Lines before the first character of ``part``."""
    return part[: len(part) - len(part.lstrip())].count(b"\n")


def open_text(path: str | Path, *, most: int | None = None) -> Records[str | None]:
    """The documents of a .txt file, or the rows {"text"} of a file of JSON; None of a row that says it is not learned.

    Args:
        path: the file.
        most: rows of JSON that are read, the first ones; None: all.

    Raises:
        UserError: the file or a row cannot be read.
    """
    if Path(path).suffix.lower() == ".txt":
        return TextFile(path)
    return RecordFile(path, _learned_text, most=most)


def _learned_text(row: Mapping[str, object]) -> str | None:
    text = text_field(row, "text")
    return text if is_trained(row) else None


class PlainTextDataset:
    """All documents end to end, cut into rows; each begins with the token that the one before ends with.

    So every token but the first is predicted once. Attention and positions run across the borders of documents, as in
    pre-training: the end token is what tells the model of them. The tokens are held in memory, four bytes each.

    Args:
        records: the documents.
        encode: makes tokens of a document, an end token among them.
        max_seq_length: tokens of a row.
        within: which of the documents are read; None: all.

    Raises:
        UserError: a document cannot be read, or there are fewer than two tokens.
    """

    blend: tuple[BlendSource, ...] = ()

    def __init__(
        self,
        records: Records[str | None],
        encode: TextEncoder,
        *,
        max_seq_length: int,
        within: range | None = None,
    ) -> None:
        self._records, self._length = records, max_seq_length
        self._documents = range(len(records)) if within is None else within
        self._tokens, self.num_dropped = array("I"), 0
        with located(lambda: f"{records.where(place)}: "):
            for place in self._documents:
                if (text := records[place]) is None:
                    self.num_dropped += 1
                else:
                    self._tokens.extend(encode(text))
        if self.num_dropped:
            _LOG.info(
                "%s: %d of %d documents say that they are not learned and are left out",
                *(records.path, self.num_dropped, len(self._documents)),
            )
        if len(self._tokens) < 2:
            raise UserError(
                f"{records.path} has too little text to learn from", fix="give a file with more text"
            )

    def __len__(self) -> int:
        return -(-(len(self._tokens) - 1) // (self._length - 1))

    def __getitem__(self, index: int) -> Row:
        start = index * (self._length - 1)
        tokens = self._tokens[start : start + self._length].tolist()
        return finish(tokens, [True] * len(tokens), truncated=False, max_seq_length=self._length)

    @property
    def fingerprint(self) -> dict[str, object]:
        """A digest of the rows."""
        return {"rows": self._records.fingerprint, "documents": str(self._documents), "length": self._length}
