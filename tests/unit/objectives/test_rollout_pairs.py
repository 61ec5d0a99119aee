# SPDX-License-Identifier: Apache-2.0
"""Pairs of a rollout: who is chosen, what counts, and whose log-probs the reference's are."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from nemo_aligner.objectives.rollout_pairs import best_and_worst, rollout_pairs
from nemo_aligner.rollout_batch import ScoredRollout

REWARDS = torch.tensor([1.0, 4.0, 2.5, -3.0, 0.0, 7.0, 7.0, 7.0])
GROUPS = torch.tensor([5, 2, 5, 2, 2, 9, 9, 9])


def test_against_a_loop_over_groups():
    rows, differ = best_and_worst(REWARDS, GROUPS, torch.ones(8, dtype=torch.bool))
    for (best, worst), number in zip(rows.tolist(), (2, 5, 9), strict=True):
        rewards = {row: float(REWARDS[row]) for row in range(8) if GROUPS[row] == number}
        assert best == max(rewards, key=rewards.get)
        assert worst == min(rewards, key=rewards.get)
    assert differ.tolist() == [True, True, False]


def test_what_is_not_usable_is_in_no_pair():
    usable = torch.tensor([True, False, True, True, True, False, False, False])
    rows, differ = best_and_worst(REWARDS, GROUPS, usable)
    assert rows.tolist()[:2] == [[4, 3], [2, 0]]
    assert differ.tolist() == [True, True, False]


@pytest.mark.parametrize("initial", [True, False])
def test_pairs_carry_the_references_sums(scored: Callable[..., ScoredRollout], initial: bool):
    batch = replace(scored(), group=torch.tensor([0, 0, 1, 1]), rewards=torch.tensor([0.0, 1.0, 2.0, 2.0]))
    pairs = rollout_pairs(batch, initial=initial, mask_unfinished=False)
    assert torch.equal(pairs.tokens[:2], batch.tokens[[1, 0]])
    assert pairs.real_pairs().tolist() == [True, False], "equal rewards prefer nothing"
    own, reference = batch.logprobs, batch.reference_logprobs
    expected = torch.stack(
        [(reference if initial else own)[row][batch.loss_tokens()[row]].sum() for row in (1, 0)]
    )
    torch.testing.assert_close(pairs.reference_sums[:2], expected)
    assert pairs.given_rewards.tolist() == [1.0, 0.0, 2.0, 2.0]
