# SPDX-License-Identifier: Apache-2.0
"""Skipped steps are counted in a row, told with what was first, and end a run."""

import math
from collections.abc import Iterator

import pytest
import torch

from nemo_aligner.algorithms.skips import NotFinite, check_finite, counted, refuse_to_end, too_many
from nemo_aligner.checkpoint.trainer_state import TrainerState
from nemo_aligner.errors import UserError
from nemo_aligner.parallel import world


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with world.ensure_single_process():
        yield


FINE = {"loss": 1.0, "grad_norm": 2.0, "skipped_steps": 0.0}
NO_LOSS = {"loss": math.nan, "grad_norm": math.nan, "skipped_steps": 1.0}
NO_GRADIENT = {"loss": 1.0, "grad_norm": math.inf, "skipped_steps": 1.0}


def test_the_first_of_a_row_is_reported_and_a_step_that_is_fine_ends_it():
    state = TrainerState()
    for step, metrics in enumerate((NO_LOSS, FINE, NO_GRADIENT, NO_LOSS, NO_LOSS), 1):
        state = counted(state, metrics, step=step)
    assert state.skipped_steps == 3
    assert state.first_skipped == "in optimizer step 3 the gradient's norm is inf"
    assert too_many(state, block="trainer.sft", limit=4) is None
    error = too_many(state, block="trainer.sft", limit=3)
    assert error is not None
    assert "trainer.sft.max_skipped_steps=3" in error.problem
    assert "in optimizer step 3 the gradient's norm is inf" in error.problem
    with pytest.raises(UserError, match="the last 3 optimizer steps of the run were skipped"):
        refuse_to_end(state)
    state = counted(state, FINE, step=6)
    assert state == TrainerState()
    refuse_to_end(state)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 2e15])
def test_a_number_that_is_no_use_is_reported(number: float):
    rewards = torch.tensor([1.0, number, number])
    with pytest.raises(NotFinite) as found:
        check_finite({"values": torch.ones(2), "rewards": rewards}, most=1e15, fix="look")
    told = f"2 of 3 rewards of this rollout are no use, the first of them: {number:g}"
    assert found.value.error.problem == told
    check_finite({"rewards": torch.tensor([1e15, -1e15])}, most=1e15, fix="look")
