# SPDX-License-Identifier: Apache-2.0
"""However a job ends, nothing of it stays: no process, no temporary folder, and the reason is told."""

import contextlib
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

SECONDS_TO_END = 10


@pytest.fixture
def training(start: Callable, settings: dict[str, object]) -> Callable:
    """Starts a run of two ranks that would take minutes, and returns once it trains."""

    def begin(**changed: object):
        endless = {
            "trainer.devices": 2,
            "trainer.sft.max_steps": 1_000_000,
            "trainer.sft.max_epochs": 1_000_000,
            "trainer.sft.val_check_interval": 0,
        } | changed
        job = start(settings | endless)
        job.wait_for("step 1/")
        assert len(job.ranks) == (0 if endless["trainer.devices"] == 1 else 2)
        return job

    return begin


def gone(processes: list[psutil.Process], *, seconds: float) -> bool:
    """Whether all have ended within some time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        alive = []
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                alive += [process] if process.status() != psutil.STATUS_ZOMBIE else []
        if not alive:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_first_ctrl_c_saves_and_says_how_to_go_on(training: Callable, tmp_path: Path, ranks: int):
    job = training(**{"trainer.devices": ranks})
    job.process.send_signal(signal.SIGINT)
    assert job.wait(timeout=SECONDS_TO_END) == 130
    assert job.alive() == []
    assert job.temporary_files == []
    assert "Traceback" not in job.err
    assert "once more ends" in job.err
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["ended_by"]) == ("stopped", "SIGINT")
    saved = json.loads((tmp_path / "run/checkpoints/last/trainer_state.json").read_text())["step"]
    assert saved == status["step"] > 0
    line = next(line for line in job.err.splitlines() if line.startswith(f"stopped after step {saved} of "))
    command = (tmp_path / "run/command.txt").read_text().splitlines()[-1]
    assert line.endswith(f"by SIGINT; the same command goes on from there: {command}")


@pytest.mark.parametrize(
    ("ranks", "number"), [(1, signal.SIGTERM), (2, signal.SIGUSR1), (2, signal.SIGTERM)], ids=str
)
def test_a_run_that_is_asked_to_end_saves_and_goes_on_later(
    training: Callable, run: Callable, settings: dict[str, object], tmp_path: Path, ranks: int, number: int
):
    job = training(**{"trainer.devices": ranks})
    job.process.send_signal(number)
    assert job.wait(timeout=SECONDS_TO_END) == 75
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["ended_by"]) == ("stopped", signal.Signals(number).name)
    assert f"by {signal.Signals(number).name}; the same command goes on from there" in job.err
    assert job.alive() == []
    assert job.temporary_files == []
    assert "Traceback" not in job.err
    assert not (tmp_path / "run/checkpoints/megatron_gpt_sft.nemo").exists()
    done = json.loads((tmp_path / "run/checkpoints/last/trainer_state.json").read_text())["step"]
    more = {"trainer.sft.max_epochs": 1_000_000, "trainer.sft.max_steps": done + 2}
    again = run(settings | more)
    assert again.wait() == 0, again.err
    assert f"resumed after step {done} of {done + 2}" in again.err
    assert f"step {done + 1}/{done + 2}" in again.err


@pytest.mark.parametrize("interval", [2, 0])
def test_a_signal_in_a_validation_does_not_wait_for_its_end(
    start: Callable, run: Callable, settings: dict[str, object], data: Path, tmp_path: Path, interval: int
):
    rows = tmp_path / "many.jsonl"
    rows.write_text(data.read_text() * 1000)
    long = settings | {"trainer.sft.max_steps": 3, "trainer.sft.val_check_interval": 2}
    job = start(long | {"model.data.validation_ds.file_path": rows})
    job.wait_for("step 1/")
    deadline = time.monotonic() + 60
    while '"step": 2' not in (tmp_path / "run/metrics.jsonl").read_text():
        assert time.monotonic() < deadline, job.err
        time.sleep(0.02)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait(timeout=SECONDS_TO_END) == 75, job.err
    assert "stopped after step 2 of 3 by SIGTERM" in job.err
    assert "validation/loss" not in (tmp_path / "run/metrics.jsonl").read_text()

    again = run(long | {"trainer.sft.val_check_interval": interval})
    assert again.wait() == 0, again.err
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], "validation/loss" in line) for line in lines]
    validated = {2: [(2, True)], 0: []}[interval], {2: [(3, True)], 0: []}[interval]
    assert found == [(1, False), (2, False), *validated[0], (3, False), *validated[1]]


def test_a_signal_in_the_validation_before_the_first_step_ends_the_run(
    start: Callable, settings: dict[str, object], data: Path, tmp_path: Path
):
    rows = tmp_path / "many.jsonl"
    rows.write_text(data.read_text() * 1000)
    job = start(settings | {"trainer.sft.val_before_train": True, "model.data.validation_ds.file_path": rows})
    job.wait_for("steps of the run: ")
    deadline = time.monotonic() + 60
    while not (tmp_path / "run/metrics.jsonl").exists():
        assert time.monotonic() < deadline, job.err
        time.sleep(0.02)
    time.sleep(0.5)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait(timeout=SECONDS_TO_END) == 75, job.err
    assert "stopped after step 0 of " in job.err
    assert (tmp_path / "run/metrics.jsonl").read_text() == ""


def test_a_signal_before_training_ends_the_run(start: Callable, settings: dict[str, object]):
    job = start(settings | {"trainer.sft.max_steps": 1000, "trainer.sft.val_check_interval": 0})
    job.wait_for("world: ")
    job.process.send_signal(signal.SIGTERM)
    code = job.wait(timeout=SECONDS_TO_END)
    assert code in (75, 143)
    assert "SIGTERM" in job.err
    assert job.temporary_files == []
    assert "Traceback" not in job.err


def test_without_checkpoints_a_run_that_is_asked_to_end_ends(training: Callable, tmp_path: Path):
    job = training(**{"exp_manager.create_checkpoint_callback": False})
    job.process.send_signal(signal.SIGTERM)
    assert job.wait(timeout=SECONDS_TO_END) == 143
    assert "nothing is saved" in job.err
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_run_ends_before_its_time_is_over(run: Callable, settings: dict[str, object], tmp_path: Path):
    endless = {"trainer.sft.max_steps": 1_000_000, "trainer.sft.max_epochs": 1_000_000}
    job = run(settings | endless | {"exp_manager.max_time_per_run": "00:00:00:12"})
    assert job.wait() == 0, job.err
    took = time.monotonic() - job.started
    assert "by exp_manager.max_time_per_run; the same command goes on from there" in job.err
    steps = json.loads((tmp_path / "run/checkpoints/last/trainer_state.json").read_text())["step"]
    # A machine so busy that starting took the time does one step.
    assert took < 12 + 3 or steps == 1
    assert not (tmp_path / "run/checkpoints/megatron_gpt_sft.nemo").exists()


def test_a_rank_that_dies_ends_the_job(training: Callable):
    job = training()
    job.ranks[1].send_signal(signal.SIGKILL)
    assert job.wait(timeout=SECONDS_TO_END) == 128 + signal.SIGKILL
    assert "rank 1 was ended by SIGKILL" in job.err
    assert job.alive() == []
    assert job.temporary_files == []


def test_a_rank_that_hangs_is_reported_by_the_others(training: Callable):
    job = training(**{"trainer.collective_timeout": 5})
    job.ranks[1].send_signal(signal.SIGSTOP)
    assert job.wait(timeout=5 + SECONDS_TO_END) == 1
    (line,) = (line for line in job.err.splitlines() if line.startswith("A collective failed"))
    assert "rank 0, phase 'step " in line
    assert "operation all_reduce" in line
    assert job.alive() == []
    assert job.temporary_files == []


# Ranks that do nothing but wait, so that the starter alone is tried, in a second.
IDLE = """
import os, signal, sys, time
from nemo_aligner.launch import subprocesses, local
if "RANK" not in os.environ:
    sys.exit(local.start_ranks(3))
subprocesses.follow_parent(signal.SIGKILL)
sys.stderr.write("up ")
sys.stderr.flush()
time.sleep(3600)
"""


@pytest.fixture
def idle(start: Callable, tmp_path: Path):
    """Three ranks that wait."""
    (tmp_path / "idle.py").write_text(IDLE)
    job = start([], command=["idle.py"])
    job.wait_for("up up up")
    assert len(job.ranks) == 3
    return job


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_starter_ends_its_ranks_on_a_signal(idle, number: signal.Signals):
    idle.process.send_signal(number)
    assert idle.wait(timeout=SECONDS_TO_END) == 128 + number
    assert idle.alive() == []
    assert idle.temporary_files == []
    told = "stopped" if number == signal.SIGHUP else "asked to save and end"
    assert f"{number.name}: the 3 ranks are {told}" in idle.err


def test_a_second_sigterm_does_not_wait(start: Callable, tmp_path: Path):
    busy = "signal.signal(signal.SIGTERM, lambda *_: sys.stderr.write('saving '))"
    (tmp_path / "saving.py").write_text(
        IDLE.replace(
            "subprocesses.follow_parent(signal.SIGKILL)",
            f"subprocesses.follow_parent(signal.SIGKILL)\n{busy}",
        )
    )
    job = start([], command=["saving.py"])
    job.wait_for("up up up")
    job.process.send_signal(signal.SIGTERM)
    job.wait_for("saving saving saving")
    assert job.process.poll() is None
    job.process.send_signal(signal.SIGTERM)
    assert job.wait(timeout=SECONDS_TO_END) == 143
    assert job.alive() == []


def test_a_second_ctrl_c_leaves_nothing_either(idle):
    idle.ranks[0].send_signal(signal.SIGSTOP)
    idle.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    idle.process.send_signal(signal.SIGINT)
    assert idle.wait(timeout=SECONDS_TO_END) == 130
    assert idle.alive() == []
    assert idle.temporary_files == []


def test_ranks_do_not_outlive_their_starter(idle):
    idle.process.send_signal(signal.SIGKILL)
    idle.wait()
    assert gone(idle.ranks, seconds=SECONDS_TO_END)


def test_the_next_start_removes_what_a_starter_that_was_killed_has_left(idle, start: Callable):
    idle.process.send_signal(signal.SIGKILL)
    idle.wait()
    assert gone(idle.ranks, seconds=SECONDS_TO_END)
    assert idle.temporary_files
    job = start([], command=["idle.py"])
    job.wait_for("up up up")
    job.process.send_signal(signal.SIGINT)
    assert job.wait(timeout=SECONDS_TO_END) == 130
    assert job.temporary_files == []


def test_the_rank_that_was_killed_is_named_even_if_another_ends_first(start: Callable, tmp_path: Path):
    (tmp_path / "killed.py").write_text(
        "import os, signal, sys, time\n"
        "from nemo_aligner.launch import local\n"
        "match os.environ.get('RANK'):\n"
        "    case None: sys.exit(local.start_ranks(2))\n"
        "    case '0': sys.exit(1)\n"
        "    case '1': time.sleep(1); os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    job = start([], command=["killed.py"])
    assert job.wait(timeout=SECONDS_TO_END) == 128 + signal.SIGSEGV
    assert "rank 1 was ended by SIGSEGV" in job.err


def test_ranks_clean_up_after_another_has_failed(start: Callable, tmp_path: Path):
    (tmp_path / "failed.py").write_text(
        "import os, pathlib, signal, sys, tempfile, time\n"
        "from nemo_aligner.launch import local\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "match os.environ.get('RANK'):\n"
        "    case None: sys.exit(local.start_ranks(2))\n"
        "    case '0':\n"
        "        with tempfile.TemporaryDirectory(prefix='staging', dir='.'):\n"
        "            pathlib.Path('ready').touch()\n"
        "            time.sleep(3600)\n"
        "    case '1':\n"
        "        while not pathlib.Path('ready').exists(): time.sleep(0.05)\n"
        "        sys.exit(3)\n"
    )
    job = start([], command=["failed.py"])
    assert job.wait(timeout=SECONDS_TO_END) == 3
    assert job.alive() == []
    assert list(tmp_path.glob("staging*")) == []
