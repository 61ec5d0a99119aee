# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints are kept, found and named; that what is unfinished is never taken for one."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from nemo_aligner.checkpoint.trainer_state import Checkpoint, TrainerState, find_checkpoints, read_checkpoint
from nemo_aligner.checkpoint.training import checkpoint_name, prunable, remove_unfinished
from nemo_aligner.errors import UserError
from nemo_aligner.run.experiment import CheckpointCallbackConfig

LOSSES = {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 50: 1.0, 60: 4.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of six steps, one without a validation before it; one unfinished, one link, one foreign folder."""
    for step, loss in LOSSES.items():
        path = tmp_path / f"{60 - step:02}-sorted-the-other-way"
        path.mkdir()
        state = TrainerState(step=step, metrics={} if loss is None else {"val_loss": loss, "val_acc": -loss})
        (path / "trainer_state.json").write_text(json.dumps(asdict(state)))
    (tmp_path / ".saving-99").mkdir()
    (tmp_path / ".saving-99/trainer_state.json").write_text("{")
    (tmp_path / "last").symlink_to("00-sorted-the-other-way")
    (tmp_path / "mine").mkdir()
    return tmp_path


def test_finished_checkpoints_are_found_in_order_of_steps(folder: Path):
    assert [c.state.step for c in find_checkpoints(folder)] == list(LOSSES)
    assert find_checkpoints(folder / "nowhere") == []


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({"save_top_k": -1}, list(LOSSES)),
        ({"save_top_k": 0}, [60]),
        ({"save_top_k": 1}, [50, 60]),  # the newer of two equals
        ({"save_top_k": 2}, [20, 50, 60]),
        ({"save_top_k": 4}, [10, 20, 30, 50, 60]),
        ({"save_top_k": 5}, [10, 20, 30, 50, 60]),
        ({"save_top_k": 6}, list(LOSSES)),
        ({"save_top_k": 2, "monitor": "validation_loss"}, [20, 50, 60]),
        ({"save_top_k": 1, "mode": "max"}, [60]),
        ({"save_top_k": 1, "mode": "max", "monitor": "val_acc"}, [50, 60]),
    ],
)
def test_the_best_and_the_newest_are_kept(folder: Path, changed: dict, kept: list[int]):
    found = find_checkpoints(folder)
    doomed = prunable(found, CheckpointCallbackConfig(**changed))
    assert [c.state.step for c in found if c not in doomed] == kept


def test_the_newest_before_steps_that_were_skipped_is_kept(tmp_path: Path):
    found = [
        Checkpoint(path=tmp_path, state=TrainerState(step=step, skipped_steps=skipped))
        for step, skipped in ((1, 0), (2, 0), (3, 1), (4, 2), (5, 3))
    ]
    doomed = prunable(found, CheckpointCallbackConfig(save_top_k=0))
    assert [c.state.step for c in found if c not in doomed] == [2, 5]


def test_what_was_interrupted_is_removed_and_nothing_else(folder: Path):
    (folder / ".saving-last").symlink_to("gone")
    remove_unfinished(folder)
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []
    assert len(find_checkpoints(folder)) == len(LOSSES)
    assert (folder / "mine").is_dir()


def test_a_folder_that_is_no_checkpoint_is_refused(folder: Path):
    with pytest.raises(UserError, match=r"mine is not a training checkpoint[\s\S]*model.restore_from_path"):
        read_checkpoint(folder / "mine")


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (
            "x--{val_loss:.3f}-{step}-{consumed_samples}-{epoch}",
            "x--val_loss=2.346-step=50-consumed_samples=9-epoch=4",
        ),
        ("x--{validation_loss:.1f}-{step}", "x--validation_loss=2.3-step=50"),
        ("x--{val_acc:.2f}-{step:05d}", "x-step=00050"),
        ("plain", "plain-step=50"),
        ("a/b-{step}", "a_b-step=50"),
    ],
)
def test_names(template: str, name: str):
    state = TrainerState(step=50, consumed_samples=9, metrics={"val_loss": 2.34567})
    assert checkpoint_name(template, state, steps_per_epoch=10) == name
