# SPDX-License-Identifier: Apache-2.0
"""Adaptive coefficients against the published rule, and the rewards' scale against numpy."""

import json
import math

import numpy as np
import pytest
import torch

from nemo_aligner.objectives.adaptive import KLController, RewardScaling
from nemo_aligner.objectives.reduce import Moments


@pytest.mark.parametrize(
    ("kl", "responses", "expected"),
    [
        (6.0, 500, 0.1),  # on target
        (6.6, 500, 0.1 * (1 + 0.1 * 0.05)),  # 10 % above it
        (600.0, 500, 0.1 * (1 + 0.2 * 0.05)),  # held at 20 %
        (-3.0, 500, 0.1 * (1 - 0.2 * 0.05)),  # an estimate below 0
        (600.0, 0, 0.1),
        (0.0, 10**9, 0.1 * 0.8),  # never more than a whole horizon's step
    ],
)
def test_the_proportional_rule(kl: float, responses: int, expected: float):
    controller = KLController(coefficient=0.1, target=6.0, horizon=10000)
    assert controller.update(kl, responses).coefficient == pytest.approx(expected, rel=1e-14)
    assert controller.coefficient == 0.1


def test_it_steers_to_its_target():
    controller = KLController(coefficient=1.0, target=4.0, horizon=1000)
    for _ in range(300):
        controller = controller.update(
            2.0 / controller.coefficient, 256
        )  # the more it costs, the less there is
    assert 2.0 / controller.coefficient == pytest.approx(4.0, rel=1e-3)


def test_a_kl_that_is_no_number_is_not_learned_from():
    with pytest.raises(AssertionError):
        KLController(coefficient=0.1, target=6.0, horizon=10000).update(math.nan, 5)


def test_a_fixed_one_stays():
    fixed = KLController(coefficient=0.02)
    assert fixed.update(1e9, 10**6) == fixed
    assert fixed.restored(KLController(coefficient=5.0, target=1.0, horizon=1.0).state_dict()) == fixed


def test_states_outlive_a_restart_bit_for_bit():
    controller = KLController(coefficient=0.1, target=6.0, horizon=10000).update(7.123, 33)
    scaling = RewardScaling().update(Moments.of(torch.tensor([0.1, 0.7, -3.0])))
    state = json.loads(json.dumps([controller.state_dict(), scaling.state_dict()]))
    # The target that stands in the settings now is the one that holds.
    fresh = KLController(coefficient=0.1, target=5.0, horizon=10000)
    assert fresh.restored(state[0]) == KLController(
        coefficient=controller.coefficient, target=5.0, horizon=10000
    )
    assert fresh.restored(KLController(coefficient=9.0).state_dict()) == fresh
    assert RewardScaling().restored(state[1]) == scaling
    assert RewardScaling().restored({}) == RewardScaling()


def test_the_divisor_is_the_spread_of_all_that_was_seen():
    draw = np.random.default_rng(0)
    seen, scaling = [], RewardScaling()
    for size in (5, 1, 40):
        seen.append(draw.normal(3, 2, size))
        scaling = scaling.update(Moments.of(torch.from_numpy(seen[-1])))
    assert scaling.divisor == pytest.approx(np.std(np.concatenate(seen)), rel=1e-12)


@pytest.mark.parametrize("numbers", [[], [5.0], [0.1, 0.1, 0.1], [0.0, 0.0]])
def test_what_does_not_vary_is_not_scaled(numbers: list[float]):
    moments = Moments.of(torch.tensor(numbers, dtype=torch.float64))
    assert RewardScaling().update(moments).divisor == 1
