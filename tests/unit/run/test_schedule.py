# SPDX-License-Identifier: Apache-2.0
"""A run in steps: what the limits and intervals make of the size of the data."""

import pytest

from nemo_aligner.errors import UserError
from nemo_aligner.run.schedule import Plan, SupervisedConfig, make_plan


def plan(**settings: int | float | None) -> Plan:
    config = SupervisedConfig(**{"max_epochs": 2, "val_check_interval": 1.0, **settings})
    return make_plan(
        config,
        batches_per_epoch=5,
        val_batches=4,
        limit_train=config.limit_train_batches,
        limit_val=config.limit_val_batches,
    )


def test_shares_and_numbers():
    expected = Plan(steps_per_epoch=5, max_steps=10, save_interval=2, val_check_interval=5, val_batches=4)
    assert plan(save_interval=2) == expected
    assert plan(save_interval=0.4) == expected
    assert plan(max_steps=3, limit_train_batches=2).max_steps == 3
    assert plan(limit_train_batches=0.4, limit_val_batches=3).max_steps == 4


@pytest.mark.parametrize("small", [0.1, 1e-6])
def test_a_small_share_is_one_and_not_none(small: float):
    assert plan(val_check_interval=small).val_check_interval == 1
    assert plan(limit_val_batches=small).val_batches == 1
    assert plan(limit_train_batches=small).steps_per_epoch == 1


@pytest.mark.parametrize("settings", [{"val_check_interval": 0}, {"val_check_interval": 0.0}])
def test_no_validation_where_none_is_asked_for(settings: dict[str, float]):
    assert not any(plan(**settings).validates_after(step) for step in range(1, 11))
    assert not plan(limit_val_batches=0.0).validates_after(10)


def test_validation_follows_the_last_step():
    steps = [step for step in range(1, 11) if plan(val_check_interval=4).validates_after(step)]
    assert steps == [4, 8, 10]


def test_a_run_without_a_step_is_refused():
    with pytest.raises(UserError, match=r"max_steps=0[\s\S]*Cure: "):
        plan(max_steps=0)


def test_saves_are_at_their_interval_and_at_the_end():
    def saves(interval: int) -> list[int]:
        return [step for step in range(1, 11) if plan(save_interval=interval).saves_after(step)]

    assert saves(4) == [4, 8, 10]
    assert saves(0) == [10]
