# SPDX-License-Identifier: Apache-2.0
"""Kahneman-Tversky optimization, end to end: what is learned, where it starts, layouts, kills."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.functional.conftest import COLOURS, LAYOUTS, MIXED, ROOT
from tests.functional.run_folder import metrics
from tests.functional.test_resume import assert_same_run

KTO = ROOT / "examples/nlp/gpt/train_gpt_kto.py"
STEPS = 16


@pytest.fixture
def settings(nemo: Path, tmp_path: Path) -> Callable[..., dict[str, object]]:
    """Settings of a toy run in a folder of the name."""
    data = tmp_path / "responses.jsonl"
    rows = [
        {"prompt": f"thing {i}:", "completion": f" {COLOURS[i % 4]}", "label": i % 4 < 2} for i in range(32)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(name: str, **changed: object) -> dict[str, object]:
        return {
            "pretrained_checkpoint.restore_from_path": nemo,
            "model.data.data_prefix": f"{{train: [{data}], validation: [{data}], test: [{data}]}}",
            "model.micro_batch_size": 4,
            "model.global_batch_size": 8,
            "model.optim.lr": 1e-3,
            "model.optim.sched.warmup_steps": 2,
            "model.optim.sched.constant_steps": 0,
            "trainer.precision": 32,
            "trainer.kto.max_epochs": STEPS // 4,
            "trainer.kto.val_check_interval": 8,
            "trainer.kto.save_interval": 4,
            "exp_manager.explicit_log_dir": tmp_path / name,
            "exp_manager.checkpoint_callback_params.save_top_k": 1,
            "exp_manager.create_tensorboard_logger": False,
        } | changed

    return make


def steps(folder: Path) -> list[dict[str, float]]:
    return [line for line in metrics(folder) if "train/loss" in line]


def test_good_responses_are_learned(settings: Callable, run: Callable, tmp_path: Path):
    job = run(settings("run"), command=[KTO])
    assert job.process.returncode == 0, job.err[-3000:]
    first, last = steps(tmp_path / "run")[0], steps(tmp_path / "run")[-1]
    assert first["train/loss"] == pytest.approx(0.5, abs=1e-6)
    assert (
        first["train/kl"] == first["train/rewards_chosen_mean"] == first["train/rewards_rejected_mean"] == 0
    )
    assert last["train/loss"] < 0.4
    assert last["train/rewards_chosen_mean"] > last["train/rewards_rejected_mean"]
    assert last["train/kl"] >= 0
    assert last["train/consumed_samples"] == STEPS * 8


def test_a_killed_run_goes_on_bit_for_bit(settings: Callable, kill_and_resume: Callable, tmp_path: Path):
    asked = {"trainer.devices": 2, "model.hidden_dropout": 0.1}
    kill_and_resume(lambda name: settings(name, **asked), command=[KTO], step=8)
    assert_same_run(tmp_path / "killed", tmp_path / "whole", steps=STEPS)


def test_results_do_not_depend_on_the_layout(settings: Callable, run: Callable, tmp_path: Path):
    for name, changed in (
        ("one", {"model.kto.log_prob_forward_micro_batch_size": 3}),
        ("many", LAYOUTS[MIXED]),
    ):
        job = run(settings(name, **{"trainer.kto.max_epochs": 1}, **changed), command=[KTO])
        assert job.process.returncode == 0, job.err[-3000:]
    for ours, theirs in zip(steps(tmp_path / "many"), steps(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-5)
