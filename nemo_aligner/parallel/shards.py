# SPDX-License-Identifier: Apache-2.0
"""Pieces of a tensor that ranks hold together, as a distributed optimizer deals them out."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Shards:
    """This rank's pieces of one tensor; those of all ranks but replicas make up the whole, and no two overlap."""

    key: str
    shape: torch.Size  # of the whole
    pieces: dict[torch.Size, Tensor]  # by the place of their first value in the whole, with as many axes
    is_replica: bool = False  # whether other ranks save them
    may_differ: bool = False  # whether the stored whole may be larger or smaller: a padded vocabulary's

    def copied(self) -> "Shards":
        """The same pieces in CPU memory of their own."""
        copies = {place: piece.detach().to("cpu", copy=True) for place, piece in self.pieces.items()}
        return replace(self, pieces=copies)


def boxes(start: int, stop: int, shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The boxes (offsets, sizes) that values start to stop - 1 of a row-major tensor make up, in their order.

    >>> list(boxes(2, 11, (4, 3)))  # the last value of a row, two rows, the first two of another
    [((0, 2), (1, 1)), ((1, 0), (2, 3)), ((3, 0), (1, 2))]
    >>> list(boxes(5, 5, (4, 3)))
    []
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # rows of which all is there
    if first > last:  # begins and ends within one row
        for offsets, sizes in boxes(start - last * row, stop - last * row, shape[1:]):
            yield (last, *offsets), (1, *sizes)
        return
    for offsets, sizes in boxes(start - (first - 1) * row, row if start < first * row else 0, shape[1:]):
        yield (first - 1, *offsets), (1, *sizes)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    for offsets, sizes in boxes(0, stop - last * row, shape[1:]):
        yield (last, *offsets), (1, *sizes)
