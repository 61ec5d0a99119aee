# SPDX-License-Identifier: Apache-2.0
"""A pair of jobs one of which is killed and started again is the pair that never was: to the bit, on both sides."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tritonclient.utils import InferenceServerException

from tests.functional.ppo_pair import LONG, Pair
from tests.functional.run_folder import assert_same_tensors, is_saving, metrics_by_step


@pytest.fixture(scope="session")
def undisturbed() -> dict[str, Path]:
    """The folder of a whole run, made when first asked for."""
    return {}


@pytest.fixture
def pair(start: Callable, nemo: Path, reward_nemo: Path, tmp_path: Path) -> Pair:
    return Pair(folder=tmp_path / "pair", start=start, nemo=nemo, reward_nemo=reward_nemo)


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count('"train_optim/loss"') if path.exists() else 0


def critic_is(pair: Pair, what: str, *, after: int) -> bool:
    try:
        busy, sequence = pair.busy()
    except (InferenceServerException, OSError):
        return False
    return busy == what and sequence >= after


MOMENTS: dict[str, tuple[str, Callable[[Pair], bool]]] = {
    "critic in infer": ("critic", lambda pair: critic_is(pair, "infer", after=3)),
    "critic in train": ("critic", lambda pair: critic_is(pair, "train", after=2)),
    "critic in save": ("critic", lambda pair: is_saving(pair.critic_folder)),
    "actor in its first rollouts": ("actor", lambda pair: steps_done(pair.actor_folder) >= 1),
    "actor in rollout": ("actor", lambda pair: steps_done(pair.actor_folder) >= 3),
    "actor in update": ("actor", lambda pair: critic_is(pair, "train", after=3)),
    "actor in save": ("actor", lambda pair: is_saving(pair.actor_folder)),
}


# Kills of one run, in order. What each moment alone breaks runs in `make test-resume`.
KILLS = [("critic in train", "actor in rollout"), ("critic in save", "actor in save")]
KILLS_LONG = [(name,) for name in MOMENTS]


def kill_at(job, pair: Pair, moment: Callable[[Pair], bool]) -> None:
    deadline = time.monotonic() + LONG
    while not moment(pair):
        assert time.monotonic() < deadline, job.err[-4000:]
        assert job.process.poll() is None, f"it ended before the moment to kill it: {job.err[-4000:]}"
        time.sleep(0.005)
    job.kill()


def assert_same(found: Pair, wanted: Path) -> None:
    """A loss that the critic gave too late is a line of its own."""
    for name in ("actor", "critic"):
        assert_same_tensors(found.folder / name, wanted / name)
        assert metrics_by_step(found.folder / name) == metrics_by_step(wanted / name)
    tables = [(folder / "actor/table_train_rollouts.jsonl").read_text() for folder in (found.folder, wanted)]
    assert tables[0] == tables[1]


@pytest.fixture
def whole(pair: Pair, undisturbed: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    if "folder" not in undisturbed:
        calm = Pair(
            folder=tmp_path_factory.mktemp("whole"),
            start=pair.start,
            nemo=pair.nemo,
            reward_nemo=pair.reward_nemo,
        )
        calm.run()
        undisturbed["folder"] = calm.folder
    return undisturbed["folder"]


@pytest.mark.parametrize(
    "kills", [*KILLS, *(pytest.param(kills, marks=pytest.mark.resume) for kills in KILLS_LONG)], ids=", ".join
)
def test_a_killed_job_goes_on_as_if_it_never_was(pair: Pair, whole: Path, kills: tuple[str, ...]):
    jobs = {"critic": pair.start_critic(), "actor": pair.start_actor()}
    for name in kills:
        doomed, moment = MOMENTS[name]
        kill_at(jobs[doomed], pair, moment)
        jobs[doomed] = pair.start_critic() if doomed == "critic" else pair.start_actor()
    told = "\n".join(f"{key}:\n{job.err[-3000:]}" for key, job in jobs.items())
    assert jobs["actor"].wait(timeout=LONG) == 0, told
    assert jobs["critic"].wait(timeout=60) == 0, told
    assert_same(pair, whole)


def test_a_pair_that_is_saved_in_the_background_keeps_the_lessons_after_it(pair: Pair, whole: Path):
    """The pair of step 2 is complete only after step 3, whose lesson the critic must be sent again."""
    async_save = {"exp_manager.checkpoint_callback_params.async_save": True}
    critic, actor = pair.start_critic(), pair.start_actor(**async_save)
    kill_at(critic, pair, lambda pair: steps_done(pair.actor_folder) >= 4)
    critic = pair.start_critic()
    assert actor.wait(timeout=LONG) == 0, actor.err[-3000:]
    assert critic.wait(timeout=60) == 0, critic.err[-3000:]
    assert_same(pair, whole)


@pytest.mark.parametrize(("what", "after"), [("infer", 3), ("train", 2)])
def test_an_actor_whose_critic_does_not_come_back_saves_and_both_go_on_later(
    pair: Pair, whole: Path, what: str, after: int
):
    critic, actor = pair.start_critic(), pair.start_actor(**{"remote_critic_rm.return_timeout": 3})
    # After the pair of step 2: the critic has later steps' lessons from the actor's checkpoint alone.
    kill_at(critic, pair, lambda pair: critic_is(pair, what, after=after))
    assert actor.wait(timeout=LONG) == 2, actor.err
    problem, fix = actor.err.splitlines()[-2:]
    assert "did not reply for 3 s" in problem
    assert f"remote_critic_rm.critic.port={pair.port}" in problem
    assert "start serve_ppo_critic.py" in fix
    # Of step 3, after which no save is due, unless the machine was busy and the kill came a step later.
    names = [path.name for path in (pair.actor_folder / "checkpoints").glob("megatron_gpt-step=*-*")]
    assert max(int(name.split("step=")[1].split("-")[0]) for name in names) >= 3
    pair.run()
    assert_same(pair, whole)


@pytest.mark.parametrize("first", ["actor", pytest.param("critic", marks=pytest.mark.resume)])
def test_a_signal_to_both_saves_halves_that_go_on_together(pair: Pair, whole: Path, first: str):
    """In the middle of a step: the critic has learned from more than the actor's checkpoint, or from less."""
    jobs = {"critic": pair.start_critic(), "actor": pair.start_actor()}
    deadline = time.monotonic() + LONG
    while not critic_is(pair, "train", after=2 if first == "actor" else 3):
        assert time.monotonic() < deadline, jobs["actor"].err
        time.sleep(0.005)
    for name in (first, *(jobs.keys() - {first})):
        jobs[name].process.send_signal(signal.SIGTERM)
    assert jobs["actor"].wait(timeout=60) == 75, jobs["actor"].err
    assert "the same command goes on from there" in jobs["actor"].err
    assert jobs["critic"].wait(timeout=30) == 75, jobs["critic"].err
    pair.run()
    assert_same(pair, whole)


def test_a_critic_whose_actor_is_gone_for_good_saves_and_ends(pair: Pair):
    critic, actor = pair.start_critic(**{"trainer.ppo.actor_timeout": 6}), pair.start_actor()
    kill_at(actor, pair, lambda pair: steps_done(pair.actor_folder) >= 1)
    assert critic.wait(timeout=60) == 75, critic.err
    assert "the actor was not heard for" in critic.err
    assert list((pair.critic_folder / "checkpoints").glob("megatron_gpt-step=*"))
