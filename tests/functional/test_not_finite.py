# SPDX-License-Identifier: Apache-2.0
"""Numbers that are infinite or NaN: skipped, told and stopped, and no weights of such are left behind."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.functional.run_folder import tensors

TRAIN_RM = Path(__file__).parents[2] / "examples/nlp/gpt/train_reward_model.py"


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [float(line["train/loss"]) for line in lines if "train/loss" in line]


def assert_ended_by_name(job, folder: Path, *, block: str) -> None:
    """Exit code 2, the first bad step in the message, the weights of the last checkpoint finite, and no .nemo."""
    assert job.wait() == 2, job.err
    problem, cure = job.err.splitlines()[-2:]
    assert problem.startswith("error: 4 optimizer steps in a row were skipped")
    assert f"{block}.max_skipped_steps=4" in problem
    found = losses(folder)
    first = next(step for step, loss in enumerate(found, 1) if loss != loss)
    assert f"in optimizer step {first} the loss is nan" in problem
    assert "model.optim.lr" in cure
    assert len(found) == first + 3
    left = tensors(folder)
    assert any("exp_avg_sq" in key for key in left)
    assert all(x.isfinite().all() for x in left.values() if x.is_floating_point())
    assert list((folder / "checkpoints").glob("*.nemo")) == []


@pytest.fixture
def hopeless() -> dict[str, object]:
    return {
        "model.optim.lr": 1e6,
        "model.optim.sched.name": "constant",
        "model.optim.sched.warmup_steps": 0,
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rate_that_is_far_too_high_ends_sft(
    run: Callable, settings: dict[str, object], hopeless: dict[str, object], tmp_path: Path, ranks: int
):
    few = {
        "trainer.devices": ranks,
        "model.data.train_ds.micro_batch_size": 2,
        "trainer.sft.max_epochs": 9,
        "trainer.sft.max_steps": 30,
        "trainer.sft.save_interval": 1,
        "trainer.sft.val_check_interval": 2,
        "trainer.sft.max_skipped_steps": 4,
        "exp_manager.checkpoint_callback_params.save_top_k": 1,
    }
    job = run(settings | hopeless | few)
    assert_ended_by_name(job, tmp_path / "run", block="trainer.sft")
    states = [
        json.loads(path.read_text())
        for path in (tmp_path / "run/checkpoints").glob("[!.]*/trainer_state.json")
        if not path.parent.is_symlink()
    ]
    # The newest, and the newest before the first skipped step.
    assert sorted(state["skipped_steps"] for state in states) == [0, 4]
    again = run(settings | hopeless | few)
    assert again.wait() == 2
    assert "error: 5 optimizer steps in a row were skipped" in again.err


def test_a_rate_that_is_far_too_high_ends_a_reward_model(
    run: Callable, nemo: Path, hopeless: dict[str, object], tmp_path: Path
):
    rows = [{"text": f"User: thing {i // 2}? Assistant: {('yes', 'no')[i % 2]}"} for i in range(32)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = ", ".join(f"{name}: [{tmp_path / 'pairs.jsonl'}]" for name in ("train", "validation", "test"))
    few = {
        "pretrained_checkpoint.restore_from_path": nemo,
        "model.data.data_prefix": f"{{{splits}}}",
        "model.micro_batch_size": 4,
        "model.global_batch_size": 8,
        "trainer.precision": 32,
        "trainer.rm.max_epochs": 20,
        "trainer.rm.max_skipped_steps": 4,
        "exp_manager.explicit_log_dir": tmp_path / "run",
        "exp_manager.create_tensorboard_logger": False,
    }
    job = run(few | hopeless, command=[TRAIN_RM])
    assert_ended_by_name(job, tmp_path / "run", block="trainer.rm")


def test_a_run_whose_last_step_was_skipped_is_no_success(
    run: Callable, settings: dict[str, object], hopeless: dict[str, object], tmp_path: Path
):
    few = {"trainer.sft.max_epochs": 9, "trainer.sft.max_steps": 6}
    for _ in range(2):
        job = run(settings | hopeless | few)
        assert job.wait() == 2
        assert "optimizer steps of the run were skipped: in optimizer step" in job.err
        assert list((tmp_path / "run/checkpoints").glob("*.nemo")) == []
