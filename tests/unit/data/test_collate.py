# SPDX-License-Identifier: Apache-2.0
"""The padding rule."""

import math

import pytest
import torch

from nemo_aligner.batch import AttributeBatch, LabeledPairs, PreferenceBatch, Unit
from nemo_aligner.data.collate import collate, padded_length, uncollated
from nemo_aligner.data.row import Row, TokenSequence


def sequence(tokens, mask=None):
    return TokenSequence(tokens=tokens, loss_mask=mask or [False] * (len(tokens) - 1) + [True])


@pytest.mark.parametrize(
    ("longest", "multiple", "maximum", "expected"),
    [
        (1, 16, 512, 16),
        (16, 16, 512, 16),
        (17, 16, 512, 32),
        (510, 16, 512, 512),
        (500, 16, 504, 504),
        (5, 1, 8, 5),
    ],
)
def test_padded_length(longest, multiple, maximum, expected):
    assert padded_length(longest, multiple=multiple, maximum=maximum) == expected


def test_rows_are_right_padded_and_masked_by_position():
    # The response holds the padding id, which must stay learned.
    response = Row(sequences=(sequence([5, 9, 9], [False, True, True]),))
    batch = collate([response, response.padding(9)], pad_id=9, seq_length=5)
    assert batch.tokens.tolist() == [[5, 9, 9, 9, 9], [9] * 5]
    assert batch.loss_mask.tolist() == [[False, True, True, False, False], [False] * 5]
    assert batch.lengths.tolist() == [3, 1]
    assert batch.tokens.dtype == torch.int64
    assert batch.count(Unit.TOKEN) == 2
    assert batch.count(Unit.SEQUENCE) == 1


def test_pairs_become_rows_and_are_read_at_their_last_tokens():
    # 9 is the padding id and stands within and at the end of texts.
    pair = Row(sequences=(sequence([5, 9, 6, 9]), sequence([5, 7])))
    batch = collate([pair, pair.padding(9)], pad_id=9, seq_length=5)
    assert isinstance(batch, PreferenceBatch)
    assert batch.tokens.tolist() == [[5, 9, 6, 9, 9], [5, 7, 9, 9, 9], [9] * 5, [9] * 5]
    assert batch.lengths.tolist() == [4, 2, 1, 1]
    assert batch.loss_mask.nonzero().tolist() == [[0, 3], [1, 1]]
    assert batch.count(Unit.PAIR) == 1
    assert batch.count(Unit.SEQUENCE) == 2


def test_labels_stay_with_their_rows():
    nan = math.nan
    first, second = (
        Row(sequences=(sequence(ids),), labels=(labels,))
        for ids, labels in (([1, 2, 3], (4.0, nan)), ([1, 2], (nan, 0.5)))
    )
    flat = collate([first, second, first.padding(0)], pad_id=0, seq_length=4)
    assert isinstance(flat, AttributeBatch)
    assert flat.loss_mask.nonzero().tolist() == [[0, 2], [1, 1]]
    expected = torch.tensor([[4.0, nan], [nan, 0.5], [nan, nan]])
    torch.testing.assert_close(flat.attributes, expected, equal_nan=True, rtol=0, atol=0)
    pair = Row(sequences=(*first.sequences, *second.sequences), labels=(*first.labels, *second.labels))
    paired = collate([pair, pair.padding(0)], pad_id=0, seq_length=4)
    assert paired.tokens.tolist() == [*flat.tokens.tolist(), [0] * 4]
    torch.testing.assert_close(paired.attributes[:3], expected, equal_nan=True, rtol=0, atol=0)
    assert paired.count(Unit.PAIR) == 1
    assert (type(flat).sequences_per_row, type(paired)) == (1, LabeledPairs)


def test_prompts_stay_as_they_are():
    prompts = [Row(sequences=(sequence(ids),), text=text) for text, ids in (("a", [1]), ("b", [2, 3]))]
    assert uncollated(prompts, pad_id=0, seq_length=8) == prompts
