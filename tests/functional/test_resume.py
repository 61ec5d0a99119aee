# SPDX-License-Identifier: Apache-2.0
"""A run that was killed and started again is the run that was never killed: weights, optimizer, metrics, to the bit.

``make test-resume`` runs every seed of every case; the other targets run the first of each.
"""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.functional.run_folder import assert_same_learning, is_saving, metrics

STEPS = 12  # three epochs of four steps


@pytest.fixture(scope="session")
def undisturbed() -> dict[int, Path]:
    """Folders of whole runs by their number of ranks, made when first asked for."""
    return {}


@pytest.fixture
def resumable(settings: dict[str, object]) -> Callable[..., dict[str, object]]:
    """Settings of a run that saves every 3 steps and validates every 4, in ``folder`` on ``ranks`` ranks."""

    def make(folder: Path, ranks: int) -> dict[str, object]:
        return settings | {
            "trainer.devices": ranks,
            "model.data.train_ds.micro_batch_size": 1,
            "model.data.train_ds.global_batch_size": 8,
            "trainer.sft.max_epochs": 3,
            "trainer.sft.max_steps": -1,
            "trainer.sft.save_interval": 3,
            "trainer.sft.val_check_interval": 4,
            "model.optim.lr": 1e-2,
            "model.optim.sched.warmup_steps": 2,
            "model.hidden_dropout": 0.1,
            "exp_manager.explicit_log_dir": folder,
            "exp_manager.checkpoint_callback_params.save_top_k": 1,
        }

    return make


def assert_same_run(found: Path, wanted: Path, *, steps: int = STEPS) -> None:
    assert_same_learning(found, wanted)
    assert [line["step"] for line in metrics(found) if "train/loss" in line] == list(range(1, steps + 1))
    checkpoints = [sorted(path.name for path in (f / "checkpoints").iterdir()) for f in (found, wanted)]
    assert checkpoints[0] == checkpoints[1]


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return sum('"train/loss"' in line for line in path.read_text().splitlines()) if path.exists() else 0


MOMENTS: dict[str, Callable[[random.Random], Callable[[Path], bool]]] = {
    "a random step": lambda draw: (lambda step: lambda folder: steps_done(folder) >= step)(
        draw.randint(1, 11)
    ),
    "an epoch's last step": lambda draw: (lambda step: lambda folder: steps_done(folder) >= step)(
        4 * draw.randint(1, 2)
    ),
    "a save": lambda draw: is_saving,  # noqa: ARG005 - the others' signature
}


def kill_at(job, folder: Path, moment: Callable[[Path], bool], *, delay: float) -> None:
    """SIGKILL all of the job's processes once ``moment`` is there, ``delay`` seconds later if it still holds."""
    deadline = time.monotonic() + 90
    while True:
        assert time.monotonic() < deadline, job.err[-4000:]
        assert job.process.poll() is None, f"it ended before the moment to kill it: {job.err[-4000:]}"
        if not moment(folder):
            time.sleep(0.001)
            continue
        time.sleep(delay)
        family = [psutil.Process(job.process.pid), *psutil.Process(job.process.pid).children()]
        for process in family:
            process.send_signal(signal.SIGSTOP)
        if moment(folder):
            break
        for process in family:
            process.send_signal(signal.SIGCONT)
    for process in family:
        process.send_signal(signal.SIGKILL)
    job.process.wait()
    psutil.wait_procs(family, timeout=10)


def cases() -> list:
    """(moments of one run's kills, ranks, seed); a moment alone, and most on several ranks, are long."""
    quick = [(("a save", "an epoch's last step", "a random step"), 1, 0), (("a save",), 4, 0)]
    every = [((moment,), ranks, seed) for moment in MOMENTS for ranks in (1, 4) for seed in range(3)]
    return [*quick, *(pytest.param(*case, marks=pytest.mark.resume) for case in every if case not in quick)]


@pytest.fixture
def whole(
    run: Callable, resumable: Callable, undisturbed: dict[int, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """Gives the folder of a run that nothing disturbed, by its number of ranks."""

    def of(ranks: int) -> Path:
        if ranks not in undisturbed:
            undisturbed[ranks] = tmp_path_factory.mktemp("undisturbed")
            job = run(resumable(undisturbed[ranks], ranks))
            assert job.wait() == 0, job.err
        return undisturbed[ranks]

    return of


@pytest.mark.parametrize(("moments", "ranks", "seed"), cases(), ids=str)
def test_a_killed_run_goes_on_as_if_it_never_was(
    run: Callable,
    start: Callable,
    resumable: Callable,
    whole: Callable[[int], Path],
    tmp_path: Path,
    moments: tuple[str, ...],
    ranks: int,
    seed: int,
):
    wanted, draw = whole(ranks), random.Random(seed)
    for moment in moments:
        killed = start(resumable(tmp_path / "run", ranks))
        kill_at(killed, tmp_path / "run", MOMENTS[moment](draw), delay=draw.random() * 0.03)
    again = run(resumable(tmp_path / "run", ranks))
    assert again.wait() == 0, again.err
    assert_same_run(tmp_path / "run", wanted)


def test_a_kill_while_a_thread_saves_loses_nothing(
    run: Callable, start: Callable, resumable: Callable, whole: Callable[[int], Path], tmp_path: Path
):
    background = {"exp_manager.checkpoint_callback_params.async_save": True}
    killed = start(resumable(tmp_path / "run", 2) | background)
    kill_at(killed, tmp_path / "run", is_saving, delay=0)
    again = run(resumable(tmp_path / "run", 2) | background)
    assert again.wait() == 0, again.err
    assert_same_run(tmp_path / "run", whole(2))


def test_a_run_goes_on_with_other_ranks_and_says_when_it_is_finished(
    run: Callable, resumable: Callable, tmp_path: Path
):
    constant = {"model.optim.sched.name": "constant", "model.hidden_dropout": 0.0}
    whole = run(resumable(tmp_path / "whole", 1) | constant)
    assert whole.wait() == 0, whole.err
    part = resumable(tmp_path / "part", 2) | constant
    assert run(part | {"trainer.sft.max_steps": 6}).wait() == 0

    finished = run(part | {"trainer.sft.max_steps": 6})
    assert finished.wait() == 2
    problem, fix = finished.err.splitlines()[-2:]
    assert problem.endswith("is finished: 6 of 6 steps are done")
    assert "trainer.sft.max_steps" in fix

    more = run(part | {"trainer.devices": 1})
    assert more.wait() == 0, more.err
    losses = [
        [
            line["train/loss"]
            for line in metrics(folder)
            if line.get("step", 0) in range(7, 11) and "train/loss" in line
        ]
        for folder in (tmp_path / "part", tmp_path / "whole")
    ]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_other_data_is_not_gone_on_with(run: Callable, resumable: Callable, data: Path, tmp_path: Path):
    settings = resumable(tmp_path / "run", 1)
    assert run(settings | {"trainer.sft.max_steps": 3}).wait() == 0
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text().replace("red", "blue"))
    job = run(settings | {"model.data.train_ds.file_path": other})
    assert job.wait() == 2
    assert "was trained on other batches: rows was" in job.err
    fresh = run(settings | {"exp_manager.resume_if_exists": False})
    assert fresh.wait() == 2
    assert "holds checkpoints of an earlier run" in fresh.err


def test_a_checkpoint_of_another_run_is_gone_on_from(run: Callable, resumable: Callable, tmp_path: Path):
    first, second = resumable(tmp_path / "first", 1), resumable(tmp_path / "second", 1)
    assert run(first | {"trainer.sft.max_steps": 3}).wait() == 0
    named = {"exp_manager.resume_from_checkpoint": tmp_path / "first/checkpoints/last"}
    job = run(second | named | {"trainer.sft.max_steps": 5})
    assert job.wait() == 0, job.err
    assert [line["step"] for line in metrics(tmp_path / "second") if "train/loss" in line] == [4, 5]
    none = run(resumable(tmp_path / "third", 1) | {"exp_manager.resume_ignore_no_checkpoint": False})
    assert none.wait() == 2
    assert none.err.splitlines()[-1].endswith("exp_manager.resume_ignore_no_checkpoint=True to start anew")


def test_wandb_is_given_the_run_whatever_its_name(start: Callable, resumable: Callable, tmp_path: Path):
    settings = resumable(tmp_path / "run", 1) | {
        "trainer.sft.max_steps": 3,
        "exp_manager.create_wandb_logger": True,
        "exp_manager.wandb_logger_kwargs.project": "colours",
        "exp_manager.wandb_logger_kwargs.name": "",
    }
    for steps in (3, 5):
        job = start(
            settings | {"trainer.sft.max_steps": steps}, env={"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        )
        assert job.wait() == 0, job.err
    runs = list((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 2
    identity = (tmp_path / "run/wandb_id").read_text()
    assert {path.stem for path in runs} == {f"run-{identity}"}
    content = runs[0].read_bytes()
    assert b"colours" in content
    assert b"megatron_gpt_sft" in content
    assert b"train/loss" in content
