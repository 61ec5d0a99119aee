# SPDX-License-Identifier: Apache-2.0
"""Work is dealt out so that ranks have alike much of it."""

import random

import pytest

from nemo_aligner.algorithms.rollout import deal


@pytest.mark.parametrize(("count", "rows", "ranks"), [(16, 2, 4), (17, 4, 3), (3, 1, 4), (64, 8, 8)])
def test_each_row_is_dealt_once_and_ranks_ask_equally_often(count: int, rows: int, ranks: int):
    draw = random.Random(0)
    lengths = [draw.randint(1, 500) for _ in range(count)]
    shares = deal(lengths, rows=rows, ranks=ranks)
    assert len({len(share) for share in shares}) == 1
    assert sorted(row for share in shares for micro in share for row in micro) == list(range(count))
    assert all(len(micro) <= rows for share in shares for micro in share)


def test_ranks_have_alike_many_tokens():
    draw = random.Random(1)
    lengths = [int(draw.lognormvariate(5, 0.6)) for _ in range(256)]
    tokens = [
        sum(lengths[row] for micro in share for row in micro) for share in deal(lengths, rows=1, ranks=8)
    ]
    in_order = [sum(lengths[rank * 32 : (rank + 1) * 32]) for rank in range(8)]
    assert max(tokens) - min(tokens) < 0.25 * (max(in_order) - min(in_order))
