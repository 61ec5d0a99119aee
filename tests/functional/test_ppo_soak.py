# SPDX-License-Identifier: Apache-2.0
"""200 steps of PPO: neither job's memory grows. A minute or two; ``make test-soak`` runs it."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.functional.ppo_pair import LONG, Pair
from tests.functional.run_folder import metrics

STEPS = 200


def resident(job) -> int:
    """Bytes of the job's own processes, Triton's among them."""
    process = psutil.Process(job.process.pid)
    return sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_memory_stays_where_it_is(start: Callable, nemo: Path, reward_nemo: Path, tmp_path: Path):
    pair = Pair(
        folder=tmp_path / "soak",
        start=start,
        nemo=nemo,
        reward_nemo=reward_nemo,
        actor_settings={
            "trainer.ppo.max_steps": STEPS,
            "trainer.ppo.max_epochs": STEPS,
            "trainer.ppo.save_interval": 10,
            "trainer.ppo.val_check_interval": 10,
        },
    )
    jobs = {"critic": pair.start_critic(), "actor": pair.start_actor()}
    found: dict[str, list[int]] = {name: [] for name in jobs}
    for step in (20, *range(100, STEPS, 20)):
        deadline = time.monotonic() + LONG
        path = pair.actor_folder / "metrics.jsonl"
        while not path.exists() or path.read_text().count('"train_optim/loss"') < step:
            assert time.monotonic() < deadline, jobs["actor"].err[-3000:]
            assert jobs["actor"].process.poll() is None, jobs["actor"].err[-3000:]
            time.sleep(0.05)
        for name, job in jobs.items():
            found[name].append(resident(job))
    for name, job in jobs.items():
        assert job.wait(timeout=LONG) == 0, job.err[-3000:]
        first, *later = found[name]
        logging.info("%s: %d MiB at step 20, then %s", name, first >> 20, [rss >> 20 for rss in later])
        assert max(later) < 1.05 * first, name
    assert len([line for line in metrics(pair.actor_folder) if "train_optim/loss" in line]) == STEPS
