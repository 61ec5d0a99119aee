# SPDX-License-Identifier: Apache-2.0
"""Responses beside responses to other prompts. Knows rows of tokens alone."""

from dataclasses import dataclass, field, replace

from nemo_aligner.data.loader import Rows
from nemo_aligner.data.row import Row, TokenSequence
from nemo_aligner.errors import UserError


@dataclass(frozen=True)
class MismatchedRows:
    """Rows of two sequences: a row's own, and the response to another prompt after the row's prompt.

    The response is that of the row half the data set away, or of the first one after that whose prompt differs.

    Args:
        rows: each of one sequence.
        max_length: tokens that the second sequence is cut to.

    Raises:
        UserError: all rows have one prompt.
    """

    rows: Rows
    max_length: int
    # Of rows that were asked for.
    _partners: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self._other(0, _prompt(self.rows[0]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        row = self.rows[index]
        (own,), prompt = row.sequences, _prompt(row)
        (other,) = self._other(index, prompt).sequences
        tokens = [*prompt, *other.split()[1]][: self.max_length]
        mask = [i >= len(prompt) for i in range(len(tokens))]
        return replace(row, sequences=(own, TokenSequence(tokens=tokens, loss_mask=mask)))

    def _other(self, index: int, prompt: list[int]) -> Row:
        """The row whose response stands after the ``prompt`` of row ``index``."""
        size = len(self.rows)
        first = self._partners.get(index, index + size // 2)
        for step in range(size):
            other = self.rows[(first + step) % size]
            if _prompt(other) != prompt:
                self._partners[index] = (first + step) % size
                return other
        raise UserError(
            f"the {size} rows of a data set have one prompt, and the KL is estimated by responses to other ones",
            fix="add responses to another prompt to model.data.data_prefix, or have no such validation set",
        )

    @property
    def fingerprint(self) -> dict[str, object]:
        """As the rows'."""
        return self.rows.fingerprint


def _prompt(row: Row) -> list[int]:
    (sequence,) = row.sequences
    return sequence.split()[0]
