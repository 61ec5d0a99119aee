# SPDX-License-Identifier: Apache-2.0
"""Parts of row-major tensors as boxes, against numpy's own order."""

import itertools

import numpy as np
import pytest

from nemo_aligner.parallel.shards import boxes


@pytest.mark.parametrize("shape", [(7,), (1,), (4, 3), (1, 5), (5, 1), (2, 3, 4), (2, 1, 3, 2)])
def test_boxes_hold_the_numbers_of_the_range_in_their_order(shape: tuple[int, ...]):
    whole = np.arange(np.prod(shape)).reshape(shape)
    for start, stop in itertools.combinations_with_replacement(range(whole.size + 1), 2):
        found = list(boxes(start, stop, shape))
        numbers = [
            whole[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))].ravel()
            for offsets, sizes in found
        ]
        assert list(itertools.chain(*numbers)) == list(range(start, stop))
        assert len(found) <= 2 * len(shape) - 1
