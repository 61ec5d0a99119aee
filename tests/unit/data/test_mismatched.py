# SPDX-License-Identifier: Apache-2.0
"""Each response stands beside the next row's response to its prompt."""

from nemo_aligner.data.mismatched import MismatchedRows
from nemo_aligner.data.row import Row, TokenSequence


class Rows(list):
    @property
    def fingerprint(self) -> dict[str, object]:
        return {"rows": "abc"}


def row(prompt: list[int], response: list[int], reward: float) -> Row:
    mask = [False] * len(prompt) + [True] * len(response)
    return Row(sequences=(TokenSequence(tokens=prompt + response, loss_mask=mask),), rewards=(reward,))


def test_responses_are_those_of_the_row_after():
    rows = Rows([row([1, 2], [3], 1.0), row([4], [5, 6], 0.0)])
    crossed = MismatchedRows(rows, max_length=4)
    assert [[sequence.tokens for sequence in crossed[i].sequences] for i in range(2)] == [
        [[1, 2, 3], [1, 2, 5, 6]],
        [[4, 5, 6], [4, 3]],
    ]
    assert crossed[0].sequences[1].loss_mask == [False, False, True, True]
    assert crossed[0].rewards == (1.0, 1.0)
    assert (len(crossed), crossed.fingerprint) == (2, {"rows": "abc"})


def test_what_has_no_room_is_cut():
    crossed = MismatchedRows(Rows([row([1, 2], [3], 1.0), row([4], [5, 6], 0.0)]), max_length=3)
    assert crossed[0].sequences[1].tokens == [1, 2, 5]
