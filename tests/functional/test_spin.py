# SPDX-License-Identifier: Apache-2.0
"""Self-play fine-tuning, end to end: what is learned, opponents, layouts, kills, what is refused."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.functional.conftest import LAYOUTS, MIXED, ROOT
from tests.functional.run_folder import metrics
from tests.functional.test_resume import assert_same_run

SPIN = ROOT / "examples/nlp/gpt/train_gpt_spin.py"


@pytest.fixture
def play(settings: dict[str, object], tmp_path: Path) -> Callable[..., dict[str, object]]:
    """Settings of a toy run in a folder of the name, of two iterations of eight steps."""
    usual = {key: value for key, value in settings.items() if not key.startswith("trainer.sft")}

    def make(name: str, **changed: object) -> dict[str, object]:
        return (
            usual
            | {
                "model.optim.lr": 3e-3,
                "model.optim.sched.warmup_steps": 0,
                "model.spin.length_params.max_length": 8,
                "trainer.spin.max_iterations": 2,
                "trainer.spin.max_epochs": 2,
                "trainer.spin.limit_train_batches": 4,
                "trainer.spin.val_check_interval": 8,
                "trainer.spin.save_interval": 4,
                "exp_manager.checkpoint_callback_params.save_top_k": 1,
                "exp_manager.explicit_log_dir": tmp_path / name,
            }
            | changed
        )

    return make


def steps(folder: Path) -> list[dict[str, float]]:
    return [line for line in metrics(folder) if "train/loss" in line]


def test_the_model_is_its_own_next_opponent(play: Callable, run: Callable, tmp_path: Path):
    job = run(play("run"), command=[SPIN])
    assert job.process.returncode == 0, job.err[-3000:]
    found = steps(tmp_path / "run")
    assert len(found) == 16
    for first in (found[0], found[8]):
        # The model is its opponent: no pair is preferred.
        assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert first["train/rewards_chosen_mean"] == pytest.approx(0, abs=1e-6)
    for last in (found[7], found[15]):
        assert last["train/acc"] > 0.8
        assert last["train/loss"] < 0.6
    validations = [line for line in metrics(tmp_path / "run") if "validation/loss" in line]
    # Of the texts alone: their likelihood, which self-play raises.
    assert validations[-1]["validation/loss"] < validations[0]["validation/loss"] < math.log(259)
    assert "validation/acc" not in validations[0]


@pytest.mark.parametrize("step", [8, 12])
def test_a_killed_run_goes_on_bit_for_bit(
    play: Callable, kill_and_resume: Callable, tmp_path: Path, step: int
):
    asked = {"trainer.devices": 2, "model.hidden_dropout": 0.1}
    kill_and_resume(lambda name: play(name, **asked), command=[SPIN], step=step)
    assert_same_run(tmp_path / "killed", tmp_path / "whole", steps=16)


def test_results_do_not_depend_on_the_layout(play: Callable, run: Callable, tmp_path: Path):
    mixed = {key: value for key, value in LAYOUTS[MIXED].items() if "batch" not in key}
    few = {"trainer.spin.max_epochs": 1, "trainer.spin.limit_train_batches": 2}
    for name, changed in (
        ("one", {"model.spin.log_prob_forward_micro_batch_size": 3}),
        ("many", {"model.data.train_ds.micro_batch_size": 2} | mixed),
    ):
        job = run(play(name, **few, **changed), command=[SPIN])
        assert job.process.returncode == 0, job.err[-3000:]
    for ours, theirs in zip(steps(tmp_path / "many"), steps(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-5)


def test_what_cannot_go_on_is_refused(play: Callable, run: Callable, tmp_path: Path):
    asked = play("run", **{"trainer.spin.max_steps": 12})
    assert run(asked, command=[SPIN]).process.returncode == 0
    job = run(asked | {"trainer.spin.max_steps": 14, "trainer.spin.max_epochs": 3}, command=[SPIN])
    assert job.process.returncode == 2
    assert "trainer.spin.max_epochs was 2, is 3" in job.err, "iterations would begin at other steps"
    shutil.rmtree(tmp_path / "run/references/1")
    job = run(asked | {"trainer.spin.max_steps": 14}, command=[SPIN])
    assert job.process.returncode == 2
    assert "references/1 is not there" in job.err


def test_prompts_are_not_learned(play: Callable, run: Callable):
    job = run(play("run", **{"model.answer_only_loss": False}), command=[SPIN])
    assert job.process.returncode == 2
    assert "model.answer_only_loss" in job.err
