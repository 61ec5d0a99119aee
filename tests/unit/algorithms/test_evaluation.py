# SPDX-License-Identifier: Apache-2.0
"""Figures of an evaluation against enumeration, and against numpy and torch."""

import itertools
import math

import numpy as np
import pytest

from nemo_aligner.algorithms.evaluation import Estimate, evaluate, majority, pass_at_k


@pytest.mark.parametrize("samples", [1, 4, 7])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one(samples: int):
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        draws = list(itertools.combinations([True] * right + [False] * (samples - right), k))
        expected = sum(map(any, draws)) / len(draws)
        assert pass_at_k(samples, right, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_holds_for_many_samples():
    # As a product, the form that does not overflow (Chen 2021, figure 3).
    expected = 1 - np.prod(1 - 100 / np.arange(1000 - 3 + 1, 1000 + 1))
    assert pass_at_k(1000, 3, 100) == pytest.approx(expected, rel=1e-9)


def test_an_interval_is_of_prompts():
    values = [0.0, 0.25, 1.0, 1.0, 0.5]
    found = Estimate.of(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.half_width == pytest.approx(1.959964 * np.std(values, ddof=1) / math.sqrt(5))
    assert Estimate.of([0.5]) == Estimate(0.5, None)


def test_95_of_100_intervals_hold_the_mean():
    draw = np.random.default_rng(0)
    estimates = [Estimate.of(draw.binomial(4, 0.3, 200) / 4) for _ in range(2000)]
    held = sum(abs(one.mean - 0.3) <= (one.half_width or 0) for one in estimates)
    assert held / 2000 == pytest.approx(0.95, abs=0.015)


def test_a_majority_is_as_right_as_its_first_vote():
    assert majority(["3", "4", "4"], [False, True, True]) == 1
    assert majority(["3", "3", "4"], [False, False, True]) == 0
    assert majority(["a", "b", "c"], [True, False, False]) == pytest.approx(1 / 3)


def test_all_figures_of_two_prompts():
    found = evaluate(
        [[1.0, 0.0, 1.0, 0.5], [0.0, 0.0, 0.0, 2.0]],
        [["5", "6", "5", "7"], ["1", "1", "2", "3"]],
        right_from=1.0,
        pass_at=(1, 2),
    )
    assert {name: one.mean for name, one in found.items()} == pytest.approx(
        {
            "reward": (0.625 + 0.5) / 2,
            "pass@1": (0.5 + 0.25) / 2,
            "pass@2": (5 / 6 + 0.5) / 2,
            "majority@4": 0.5,
        }
    )
