# SPDX-License-Identifier: Apache-2.0
"""Each response stands beside a response to another prompt, after its own prompt."""

import pytest

from nemo_aligner.data.collate import collate_mismatched
from nemo_aligner.data.mismatched import MismatchedRows
from nemo_aligner.data.row import Row, TokenSequence
from nemo_aligner.errors import UserError


class Rows(list):
    @property
    def fingerprint(self) -> dict[str, object]:
        return {"rows": "abc"}


def row(prompt: list[int], response: list[int], reward: float = 1.0) -> Row:
    mask = [False] * len(prompt) + [True] * len(response)
    return Row(sequences=(TokenSequence(tokens=prompt + response, loss_mask=mask),), rewards=(reward,))


def test_a_response_to_another_prompt_stands_after_a_row_s_prompt():
    mixed = MismatchedRows(Rows([row([1, 2], [3], 1.0), row([4], [5, 6], 0.0)]), max_length=4)
    assert [[sequence.tokens for sequence in mixed[i].sequences] for i in range(2)] == [
        [[1, 2, 3], [1, 2, 5, 6]],
        [[4, 5, 6], [4, 3]],
    ]
    assert mixed[0].sequences[1].loss_mask == [False, False, True, True]
    assert (len(mixed), mixed.fingerprint) == (2, {"rows": "abc"})


def test_what_has_no_room_is_cut():
    mixed = MismatchedRows(Rows([row([1, 2], [3]), row([4], [5, 6])]), max_length=3)
    assert mixed[0].sequences[1].tokens == [1, 2, 5]


def test_the_response_is_never_to_the_same_prompt():
    rows = Rows([row([1], [10]), row([2], [20]), row([1], [11]), row([1], [12]), row([3], [30])])
    mixed = MismatchedRows(rows, max_length=4)
    # Half of five rows away, or the first one after that with another prompt.
    assert [mixed[i].sequences[1].tokens for i in range(5)] == [[1, 30], [2, 12], [1, 30], [1, 20], [3, 20]]


@pytest.mark.parametrize("count", [1, 3])
def test_rows_of_one_prompt_are_refused(count):
    with pytest.raises(UserError, match=f"the {count} rows of a data set have one prompt"):
        MismatchedRows(Rows([row([1], [2 + i]) for i in range(count)]), max_length=4)


def test_batches():
    rows = MismatchedRows(Rows([row([1, 2], [3], 0.5), row([4], [5, 6], -0.5)]), max_length=4)
    batch = collate_mismatched([rows[0], rows[1], rows[0].padding(0)], pad_id=0, seq_length=5)
    assert batch.good.tolist() == [True, True, False, False, True, True]
    assert batch.tokens[:4].tolist() == [[1, 2, 3, 0, 0], [1, 2, 5, 6, 0], [4, 5, 6, 0, 0], [4, 3, 0, 0, 0]]
    assert batch.loss_lengths().tolist() == [1, 2, 2, 1, 0, 0]
