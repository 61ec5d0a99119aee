# SPDX-License-Identifier: Apache-2.0
"""A disk that is full ends the run by name, leaves what was there whole, and with room the run goes on."""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.functional.ppo_pair import LONG, Pair
from tests.functional.run_folder import metrics, tensors


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a disk of so many bytes in memory; called again, it is given another size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int) -> Path:
        options = f"size={size}" + (",remount" if os.path.ismount(folder) else "")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        if subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode:
            pytest.skip("a small disk takes the right to mount one")
        return folder

    if shutil.which("mount") is None:
        pytest.skip("a small disk takes the program mount")
    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", folder], check=True)


def asked(settings: dict[str, object], folder: Path) -> dict[str, object]:
    return settings | {
        "trainer.sft.max_steps": 4,
        "trainer.sft.save_interval": 1,
        "trainer.sft.val_check_interval": 0,
        "exp_manager.explicit_log_dir": folder,
        "exp_manager.checkpoint_callback_params.save_top_k": -1,
    }


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_full_disk_is_reported_and_the_run_goes_on_with_room(
    run: Callable, settings: dict[str, object], small_disk: Callable, tmp_path: Path
):
    whole = run(asked(settings, tmp_path / "whole"))
    assert whole.wait() == 0, whole.err
    one = size_of((tmp_path / "whole/checkpoints/last").resolve())

    disk = small_disk(int(2.6 * one))
    job = run(asked(settings, disk / "run"))
    assert job.wait() == 2, job.err
    problem, fix = job.err.splitlines()[-2:]
    assert problem.startswith(f"error: the disk of {disk}/run/checkpoints has no room: a checkpoint needs ")
    assert problem.endswith(" are free")
    assert "make room there" in fix
    assert "Traceback" not in job.err
    assert "digests" not in job.err
    kept = sorted(path.name for path in (disk / "run/checkpoints").iterdir())
    assert [name for name in kept if name.startswith(".saving-")] == []
    assert json.loads((disk / "run/status.json").read_text())["state"] == "failed"

    small_disk(8 * one)
    again = run(asked(settings, disk / "run"))
    assert again.wait() == 0, again.err
    assert f"resumed after step {len(kept) - 1} of 4" in again.err
    ours, theirs = tensors(disk / "run"), tensors(tmp_path / "whole")
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_a_disk_without_any_room_is_reported_wherever_a_run_writes(
    run: Callable, settings: dict[str, object], small_disk: Callable
):
    disk = small_disk(1 << 16)
    (disk / "run").mkdir()
    with (disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(b"x" * 4096)
    job = run(asked(settings, disk / "run"))
    assert job.wait() == 2, job.err
    problem, fix = job.err.splitlines()[-2:]
    assert problem.startswith(f"error: the disk of {disk}/run has no room")
    assert fix.startswith("Fix: make room there")
    assert "Traceback" not in job.err


def test_a_critic_whose_disk_is_full_says_so_to_the_actor_and_both_go_on_with_room(
    start: Callable, nemo: Path, reward_nemo: Path, small_disk: Callable, tmp_path: Path
):
    whole, pair = (
        Pair(folder=tmp_path / name, start=start, nemo=nemo, reward_nemo=reward_nemo)
        for name in ("whole", "pair")
    )
    whole.run()
    one = size_of((whole.critic_folder / "checkpoints/last").resolve())

    disk = small_disk(int(1.6 * one))
    pair.critic_settings = {"exp_manager.explicit_log_dir": disk / "critic"}
    critic, actor = pair.start_critic(), pair.start_actor()
    assert actor.wait(timeout=LONG) == 2, actor.err[-3000:]
    told = actor.err.splitlines()[-2:]
    assert f"the disk of {disk}/critic/checkpoints has no room: a checkpoint needs " in "".join(told)
    assert told[-1].startswith("Fix: ")
    assert "Traceback" not in actor.err + critic.err
    critic.process.terminate()
    critic.wait()

    small_disk(8 * one)
    critic, actor = pair.start_critic(), pair.start_actor()
    assert actor.wait(timeout=LONG) == 0, actor.err[-3000:] + critic.err[-3000:]
    assert critic.wait() == 0, critic.err[-3000:]
    assert metrics(pair.actor_folder) == metrics(whole.actor_folder)
