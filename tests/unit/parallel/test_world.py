# SPDX-License-Identifier: Apache-2.0
"""Which GPU a rank takes, from numbers alone."""

import pytest

from nemo_aligner.errors import UserError
from nemo_aligner.parallel.ranks import Ranks
from nemo_aligner.parallel.world import device_index


def at(local_rank: int, local_size: int, starter: str) -> Ranks:
    return Ranks(
        rank=8 + local_rank,
        world_size=16,
        local_rank=local_rank,
        local_size=local_size,
        init_method="env://",
        starter=starter,
    )


def test_a_process_alone_takes_the_first_gpu():
    assert device_index(None, 4) == 0


@pytest.mark.parametrize(
    ("ranks", "visible", "index"),
    [
        (at(3, 4, "local"), 4, 3),
        (at(3, 4, "srun"), 8, 3),
        (at(3, 4, "srun"), 1, 0),
        (at(3, 1, "torchrun"), 4, 3),
    ],
)
def test_a_ranks_own_gpu(ranks: Ranks, visible: int, index: int):
    assert device_index(ranks, visible) == index


@pytest.mark.parametrize("ranks", [at(0, 4, "local"), at(3, 4, "torchrun"), at(3, 1, "srun")])
def test_more_ranks_than_gpus_is_reported_by_every_rank(ranks: Ranks):
    with pytest.raises(UserError, match=r"4 ranks on this node[\s\S]*Fix: set trainer.devices=2,"):
        device_index(ranks, 2)
