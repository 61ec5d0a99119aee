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
    expected = Plan(
        steps_per_epoch=5,
        max_steps=10,
        set_by="trainer.sft.max_epochs=2",
        save_interval=2,
        val_check_interval=5,
        val_batches=4,
    )
    assert plan(save_interval=2) == expected
    assert plan(save_interval=0.4) == expected
    assert plan(max_steps=3, limit_train_batches=2).max_steps == 3
    assert plan(limit_train_batches=0.4, limit_val_batches=3).max_steps == 4


@pytest.mark.parametrize(
    ("max_epochs", "max_steps", "steps", "set_by"),
    [
        (None, -1, 5, "one pass over the data, as neither trainer.sft.max_epochs nor max_steps is set"),
        (None, 100, 100, "trainer.sft.max_steps=100"),
        (None, 3, 3, "trainer.sft.max_steps=3"),
        (1, 100, 5, "trainer.sft.max_epochs=1"),
        (3, 7, 7, "trainer.sft.max_steps=7"),
        (3, -1, 15, "trainer.sft.max_epochs=3"),
    ],
)
def test_max_steps_alone_are_that_many(max_epochs: int | None, max_steps: int, steps: int, set_by: str):
    found = plan(max_epochs=max_epochs, max_steps=max_steps)
    assert (found.max_steps, found.set_by) == (steps, set_by)


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
    with pytest.raises(UserError, match=r"max_steps=0[\s\S]*Fix: "):
        plan(max_steps=0)


def test_saves_are_at_their_interval_and_at_the_end():
    def saves(interval: int) -> list[int]:
        return [step for step in range(1, 11) if plan(save_interval=interval).saves_after(step)]

    assert saves(4) == [4, 8, 10]
    assert saves(0) == [10]


# (step, max_steps, val_check_interval, save_interval, validation batches) and what NeMo-Aligner's check_progress
# (nemo_aligner/utils/trainer_utils.py at 15887e58) says of them: whether to validate, to save, whether it is the end.
PROGRESS = [
    ((1, 10, 2, 4, 4), (False, False, False)),
    ((2, 10, 2, 4, 4), (True, False, False)),
    ((4, 10, 2, 4, 4), (True, True, False)),
    ((10, 10, 2, 4, 4), (True, True, True)),
    ((10, 10, 3, 6, 4), (True, True, True)),
    ((5, 10, 5, 5, 4), (True, True, False)),
    ((7, 10, 0, 4, 4), (False, False, False)),
    ((8, 10, 0, 4, 4), (False, True, False)),
    ((10, 10, 0, 4, 4), (False, True, True)),
    ((4, 10, 2, 4, 0), (False, True, False)),
    ((10, 10, 2, 4, 0), (False, True, True)),
    ((3, 3, 1, 1, 4), (True, True, True)),
    # Our choice, where it saves nothing: what was trained is saved at the end, whatever save_interval says.
    ((10, 10, 2, 0, 4), (True, True, True)),
    # Our choice, where it fails: a save_interval need not be a multiple of val_check_interval.
    ((3, 10, 2, 3, 4), (False, True, False)),
]


@pytest.mark.parametrize(("settings", "wanted"), PROGRESS)
def test_progress_is_the_originals(settings: tuple[int, ...], wanted: tuple[bool, bool, bool]):
    step, max_steps, val_check_interval, save_interval, val_batches = settings
    made = Plan(
        steps_per_epoch=10,
        max_steps=max_steps,
        save_interval=save_interval,
        val_check_interval=val_check_interval,
        val_batches=val_batches,
    )
    assert (made.validates_after(step), made.saves_after(step), step == made.max_steps) == wanted
