# SPDX-License-Identifier: Apache-2.0
"""Forty kills at seeded random moments: each run goes on, and ends as the one that was never killed, to the bit.

``make test-kills`` runs all of them, on an idle machine; the other targets the first run of each kind, six kills.
"""

import contextlib
import json
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest

from tests.functional.conftest import Job
from tests.functional.ppo_pair import Pair
from tests.functional.test_ppo_resume import assert_same
from tests.functional.test_resume import assert_same_run

PATIENCE = 120.0  # seconds, on an idle machine; what takes longer hangs
SFT_KILLS = PPO_KILLS = (3, 4, 4, 4, 5)  # of each run; its place is its seed
SFT_STEPS, PPO_STEPS = 24, 5


def runs(kills: Sequence[int]) -> list:
    """(seed, number of kills); all but the first are long."""
    return [pytest.param(seed, n, marks=[pytest.mark.kills] if seed else []) for seed, n in enumerate(kills)]


def moments(draw: random.Random, seed: int, kills: int, *, steps: int) -> list[int]:
    """After how many steps each kill comes, in order; the first one of an odd seed comes while the job starts."""
    # The last ones are left out: what comes after them may be over before the kill.
    found = sorted(draw.randint(1, max(steps - 6, steps // 2 + 1)) for _ in range(kills))
    return [0, *found[1:]] if seed % 2 else found


@dataclass
class Calm:
    """A run that was never killed, and how fast this machine is at it."""

    folder: Path
    metric: str  # of each step
    began: float = field(default_factory=time.time)

    @property
    def _times(self) -> list[float]:
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return [line["time"] for line in lines if self.metric in line]

    @property
    def starting(self) -> float:
        """Seconds to the first step."""
        return self._times[0] - self.began

    @property
    def pace(self) -> float:
        """Seconds of a step."""
        return (self._times[-1] - self._times[0]) / (len(self._times) - 1)


@dataclass
class Wait:
    """Until so many steps are done by the job as it is now, whatever an earlier life of it has logged."""

    folder: Path
    metric: str
    since: float = field(default_factory=time.time)

    def done(self, steps: int) -> bool:
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return False
        whole = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        return any(
            line["step"] >= steps and line["time"] > self.since for line in whole if self.metric in line
        )


def until(there: Callable[[], bool], told: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not there():
        assert time.monotonic() < deadline, f"nothing for {PATIENCE} s\n{told()}"
        time.sleep(0.005)


def assert_ended_by_name(job: Job) -> None:
    """A job that lost a part of it has ended in time, and says so to people."""
    assert job.wait(timeout=PATIENCE) != 0
    assert "Traceback" not in job.err, job.err


@pytest.fixture(scope="session")
def never_killed() -> dict[str, Calm]:
    """Whole runs, made when first asked for."""
    return {}


@pytest.fixture
def resumable(settings: dict[str, object]) -> Callable[[Path], dict[str, object]]:
    """Settings of a run on 2 ranks that saves every 3 steps and validates every 4."""

    def make(folder: Path) -> dict[str, object]:
        return settings | {
            "trainer.devices": 2,
            "model.data.train_ds.micro_batch_size": 1,
            "trainer.sft.max_epochs": SFT_STEPS // 4,
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


@pytest.fixture(scope="session")
def hits() -> list[str]:
    """The kills that came in time, by what they hit: on a busy machine a run may have ended before its last one."""
    return []


def victims(job: Job, who: str) -> list[psutil.Process]:
    starter = psutil.Process(job.process.pid)
    ranks = []
    for child in starter.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            ranks += [child] if "python" in child.name() else []
    match who:
        case "starter":
            return [starter]
        case "all":
            return [starter, *ranks]
    return ranks[int(who) :][:1] or [starter]


@pytest.mark.parametrize(("seed", "kills"), runs(SFT_KILLS))
@pytest.mark.timeout(1800)
def test_sft_goes_on_after_every_kill(
    run: Callable,
    start: Callable,
    resumable: Callable,
    never_killed: dict[str, Calm],
    hits: list[str],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    kills: int,
):
    if "sft" not in never_killed:
        never_killed["sft"] = Calm(tmp_path_factory.mktemp("sft"), "train/loss")
        whole = run(resumable(never_killed["sft"].folder))
        assert whole.wait() == 0, whole.err
    calm = never_killed["sft"]
    draw, folder = random.Random(seed), tmp_path / "run"
    for step in moments(draw, seed, kills, steps=SFT_STEPS):
        job, wait = start(resumable(folder)), Wait(folder, calm.metric)
        if step:
            until(
                lambda w=wait, s=step, j=job: w.done(s) or j.process.poll() is not None, lambda j=job: j.err
            )
        time.sleep(draw.random() * (2 * calm.pace if step else calm.starting))
        if job.process.poll() == 0:
            break
        family = [psutil.Process(job.process.pid), *psutil.Process(job.process.pid).children(recursive=True)]
        for process in victims(job, draw.choice(("starter", "all", "0", "1"))):
            process.send_signal(signal.SIGKILL)
        hits.append(f"sft after step {step}")
        assert_ended_by_name(job)
        assert not psutil.wait_procs(family, timeout=PATIENCE)[1]
    else:
        job = start(resumable(folder))
    assert job.wait(timeout=PATIENCE) == 0, job.err
    assert_same_run(folder, calm.folder, steps=SFT_STEPS)


@dataclass
class Jobs:
    """Both jobs of a pair; one that has ended by a named error is started again, as a person would."""

    pair: Pair
    critic: Job = field(init=False)
    actor: Job = field(init=False)

    def __post_init__(self) -> None:
        self.critic, self.actor = self.pair.start_critic(), self.pair.start_actor()

    def start_again(self, name: str) -> None:
        setattr(self, name, self.pair.start_critic() if name == "critic" else self.pair.start_actor())

    def revive(self) -> None:
        for name in ("critic", "actor"):
            job: Job = getattr(self, name)
            if job.process.poll() not in (None, 0):
                assert_ended_by_name(job)
                self.start_again(name)

    @property
    def told(self) -> str:
        return f"critic:\n{self.critic.err[-3000:]}\nactor:\n{self.actor.err[-3000:]}"

    def ended(self) -> bool:
        self.revive()
        return self.actor.process.poll() == 0 and self.critic.process.poll() == 0


@pytest.fixture
def pair(start: Callable, nemo: Path, reward_nemo: Path, tmp_path: Path) -> Pair:
    return Pair(folder=tmp_path / "pair", start=start, nemo=nemo, reward_nemo=reward_nemo)


def kill_a_starting_endpoint(job: Job) -> None:
    """SIGKILL the first endpoint's process that Triton starts, before the server is up."""

    def endpoints() -> Iterator[psutil.Process]:
        for process in psutil.Process(job.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # a helper of Triton's start that is over
                if process.name() == "triton_python_backend_stub":
                    yield process

    found: list[psutil.Process] = []

    def there() -> bool:
        found[:] = list(endpoints())
        return bool(found)

    until(there, lambda: job.err)
    assert "serving at" not in job.err
    found[0].send_signal(signal.SIGKILL)


@pytest.mark.parametrize(("seed", "kills"), runs(PPO_KILLS))
@pytest.mark.timeout(3600)
def test_a_pair_goes_on_after_every_kill(
    pair: Pair,
    never_killed: dict[str, Calm],
    hits: list[str],
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    kills: int,
):
    if "ppo" not in never_killed:
        whole = replace(pair, folder=tmp_path_factory.mktemp("ppo"))
        never_killed["ppo"] = Calm(whole.actor_folder, "train_optim/loss")
        whole.run()
    calm = never_killed["ppo"]
    draw, jobs = random.Random(seed), Jobs(pair)
    plan = moments(draw, seed, kills, steps=PPO_STEPS)
    if seed == 0:
        # One of the kills is of a part of Triton while it starts.
        kill_a_starting_endpoint(jobs.critic)
        hits.append("triton")
        plan = plan[1:]
    since = time.time()
    for step in plan:
        wait = Wait(pair.actor_folder, calm.metric, since=since)

        def reached(wait: Wait = wait, step: int = step) -> bool:
            jobs.revive()
            return wait.done(step) or jobs.actor.process.poll() == 0

        if step:
            until(reached, lambda: jobs.told)
        time.sleep(draw.random() * (calm.pace if step else calm.starting))
        if jobs.actor.process.poll() == 0:
            break
        name = draw.choice(("actor", "critic"))
        doomed: Job = getattr(jobs, name)
        if doomed.process.poll() is None:
            doomed.kill()
            since = time.time()
            hits.append(f"{name} after step {step}")
            jobs.start_again(name)
    until(jobs.ended, lambda: jobs.told)
    assert_same(pair, calm.folder.parent)


@pytest.mark.kills
def test_forty_kills_came_in_time(hits: list[str]):
    """The last of the file: it looks at what the others have done."""
    assert len(hits) == sum(SFT_KILLS) + sum(PPO_KILLS) == 40
    assert len([hit for hit in hits if "after step" in hit and not hit.endswith(" 0")]) >= 25
