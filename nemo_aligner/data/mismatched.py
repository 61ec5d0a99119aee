# SPDX-License-Identifier: Apache-2.0
"""Responses beside responses to other prompts. Knows rows of tokens alone."""

from dataclasses import dataclass, replace

from nemo_aligner.data.loader import Rows
from nemo_aligner.data.row import Row, TokenSequence


@dataclass(frozen=True)
class MismatchedRows:
    """Rows of two sequences: a row's own, and the response of the row after it to the row's prompt.

    Args:
        rows: each of one sequence.
        max_length: tokens that the second sequence is cut to.
    """

    rows: Rows
    max_length: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        row, after = self.rows[index], self.rows[(index + 1) % len(self.rows)]
        (own,), (other,) = row.sequences, after.sequences
        border = own.loss_mask.index(True)
        tokens = [*own.tokens[:border], *other.tokens[other.loss_mask.index(True) :]][: self.max_length]
        crossed = TokenSequence(tokens=tokens, loss_mask=[i >= border for i in range(len(tokens))])
        return replace(row, sequences=(own, crossed), rewards=row.rewards * 2)

    @property
    def fingerprint(self) -> dict[str, object]:
        """As the rows'."""
        return self.rows.fingerprint
