# SPDX-License-Identifier: Apache-2.0
"""Which rows a batch has: over epochs, after a resume, and over ranks."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest

from nemo_aligner.data.sampler import BlendSource, GlobalBatchSampler, rank_rows
from nemo_aligner.errors import UserError


def sampler(num_samples=10, global_batch_size=4, *, shuffle=True, seed=7, drop_last=True):
    return GlobalBatchSampler(num_samples, global_batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)


@pytest.mark.parametrize(
    ("num_samples", "drop_last", "sizes"),
    [
        (10, True, [4, 4]),
        (10, False, [4, 4, 2]),
        (8, False, [4, 4]),
        (3, True, [3]),
        (3, False, [3]),
        (1, True, [1]),
    ],
)
def test_batches_of_an_epoch(num_samples, drop_last, sizes):
    batches = sampler(num_samples, drop_last=drop_last)
    assert batches.batches_per_epoch == len(sizes)
    rows = [batches.rows(i) for i in range(len(sizes))]
    assert [len(batch) for batch in rows] == sizes
    seen = list(chain.from_iterable(rows))
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(num_samples))


def test_file_order_without_shuffle():
    plain = sampler(shuffle=False, drop_last=False)
    assert [plain.rows(i) for i in range(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3]]


def test_each_epoch_has_its_own_order_and_every_row():
    batches = sampler(num_samples=100, global_batch_size=10)
    epochs = [[row for i in range(10) for row in batches.rows(10 * epoch + i)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != list(range(100))


def test_a_batch_is_a_function_of_seed_and_index():
    straight = sampler()
    expected = [straight.rows(i) for i in range(9)]
    for start in range(9):
        assert sampler().rows(start) == expected[start]
    assert [sampler(seed=8).rows(i) for i in range(9)] != expected
    backwards = sampler()
    assert [backwards.rows(i) for i in reversed(range(9))] == expected[::-1]


@pytest.mark.parametrize("num_rows", [1, 3, 5, 8, 16])
@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_ranks_share_a_batch(num_rows, dp_size, micro_batch_size):
    rows = [100 + i for i in range(num_rows)]
    ranks = [
        rank_rows(rows, dp_rank=rank, dp_size=dp_size, micro_batch_size=micro_batch_size)
        for rank in range(dp_size)
    ]
    assert [row for rank in ranks for micro in rank for row in micro] == rows
    assert len({len(rank) for rank in ranks}) == 1
    alone = rank_rows(rows, dp_rank=0, dp_size=1, micro_batch_size=micro_batch_size)
    assert [micro for rank in ranks for micro in rank if micro] == alone
    assert all(len(micro) <= micro_batch_size for micro in alone)


BLEND = (
    BlendSource(num_rows=10, weight=0.25),
    BlendSource(num_rows=50, weight=0.25),
    BlendSource(num_rows=40, weight=0.5),
)


def blended(*, shuffle=True, seed=7, blend=BLEND, global_batch_size=7):
    num_samples = sum(share.num_rows for share in blend)
    return GlobalBatchSampler(
        num_samples, global_batch_size, shuffle=shuffle, seed=seed, drop_last=False, blend=blend
    )


def epoch_rows(batches, epoch):
    count = batches.batches_per_epoch
    return [row for i in range(count * epoch, count * (epoch + 1)) for row in batches.rows(i)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_epoch_of_a_blend_has_every_sources_share(shuffle):
    batches = blended(shuffle=shuffle)
    for epoch in range(4):
        rows = np.array(epoch_rows(batches, epoch))
        assert np.histogram(rows, [0, 10, 60, 100])[0].tolist() == [25, 25, 50]


def test_a_blends_sources_go_on_where_they_stood():
    seen = Counter(row for epoch in range(4) for row in epoch_rows(blended(), epoch))
    # 4 epochs draw 100 rows of 10, 100 of 50, and 200 of 40.
    assert [{seen[row] for row in rows} for rows in (range(10), range(10, 60), range(60, 100))] == [
        {10},
        {2},
        {5},
    ]


def test_unshuffled_epochs_of_a_blend_are_alike():
    batches = blended(shuffle=False)
    first = epoch_rows(batches, 0)
    assert first == [*range(10), *range(10), *range(5), *range(10, 35), *range(60, 100), *range(60, 70)]
    assert epoch_rows(batches, 3) == first


def test_a_batch_of_a_blend_is_a_function_of_seed_and_index():
    straight = blended()
    expected = [straight.rows(i) for i in range(45)]
    assert [blended().rows(i) for i in reversed(range(45))] == expected[::-1]
    assert [blended(seed=8).rows(i) for i in range(45)] != expected
    # Sources are mixed within an epoch, not read one after the other.
    assert len({int(np.searchsorted([10, 60], row, side="right")) for row in expected[0] + expected[1]}) == 3


@pytest.mark.parametrize(
    ("weights", "quotas"),
    [((1, 1, 1), [34, 33, 33]), ((2, 1, 1), [50, 25, 25]), ((0.2, 0.3, 0.5), [20, 30, 50])],
)
def test_shares_are_rounded_to_whole_rows(weights, quotas):
    sizes = (20, 20, 60)
    blend = tuple(BlendSource(num_rows=n, weight=w) for n, w in zip(sizes, weights, strict=True))
    rows = epoch_rows(blended(blend=blend), 0)
    assert np.histogram(rows, [0, 20, 40, 100])[0].tolist() == quotas


def test_a_weight_that_draws_nothing_is_refused():
    blend = (BlendSource(num_rows=3, weight=1), BlendSource(num_rows=3, weight=0.01))
    with pytest.raises(UserError, match=r"weight 0.0099\d* of file 2 .* no row in an epoch of 6"):
        blended(blend=blend)


def test_only_a_blend_shows_in_the_fingerprint():
    plain = sampler().fingerprint
    assert set(plain) == {"num_samples", "global_batch_size", "shuffle", "seed", "drop_last"}
    assert blended().fingerprint["blend"] == [[10, 0.25], [50, 0.25], [40, 0.5]]


def test_the_shuffle_of_an_epoch_is_numpys():
    # The order of runs that are gone on with.
    rows = epoch_rows(sampler(num_samples=50, global_batch_size=5), 2)
    assert rows == np.random.default_rng([7, 2]).permutation(50).tolist()
