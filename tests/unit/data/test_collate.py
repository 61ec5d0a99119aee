# SPDX-License-Identifier: Apache-2.0
"""The padding rule."""

import pytest
import torch

from nemo_aligner.batch import Unit
from nemo_aligner.data.collate import collate, empty_sample, padded_length
from nemo_aligner.data.sample import Sample


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
    # The answer holds the padding id, which must stay learned.
    answer = Sample(tokens=[5, 9, 9], mask=[False, True, True], truncated=False)
    batch = collate([answer, empty_sample(9)], pad_id=9, seq_length=5)
    assert batch.tokens.tolist() == [[5, 9, 9, 9, 9], [9] * 5]
    assert batch.mask.tolist() == [[False, True, True, False, False], [False] * 5]
    assert batch.lengths.tolist() == [3, 1]
    assert batch.tokens.dtype == torch.int64
    assert batch.count(Unit.TOKEN) == 2
    assert batch.count(Unit.SEQUENCE) == 1
