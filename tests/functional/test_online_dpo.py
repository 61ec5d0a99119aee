# SPDX-License-Identifier: Apache-2.0
"""Online DPO, end to end: a rule is learned from pairs of own responses; kills, layouts, what is refused."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.functional.conftest import LAYOUTS, MIXED, ROOT
from tests.functional.run_folder import assert_same_learning, metrics
from tests.functional.test_grpo import settings  # noqa: F401 - a fixture

ONLINE_DPO = ROOT / "examples/nlp/gpt/train_gpt_online_dpo.py"


@pytest.fixture
def asked(settings: Callable) -> Callable[..., dict[str, object]]:  # noqa: F811
    """Settings of a toy run in a folder of the name: eight pairs of the best and the worst of four responses."""

    def make(name: str, **changed: object) -> dict[str, object]:
        return settings(name, **({"model.global_batch_size": 4, "model.micro_batch_size": 2} | changed))

    return make


def steps(folder: Path) -> list[dict[str, float]]:
    return [line for line in metrics(folder) if "train_optim/loss" in line]


@pytest.mark.parametrize("reference", ["initial", "rollout"])
def test_a_rule_is_learned(asked: Callable, run: Callable, tmp_path: Path, reference: str):
    longer = {"trainer.ppo.max_steps": 25, "model.optim.lr": 1e-3, "model.dpo.reference": reference}
    job = run(asked("run", **longer), command=[ONLINE_DPO])
    assert job.process.returncode == 0, job.err[-3000:]
    found = steps(tmp_path / "run")
    rewards = [line["train_rollouts/rewards"] for line in found]
    assert sum(rewards[-5:]) > 1.5 * sum(rewards[:5])
    assert all(line["train_optim/optim_step"] == 2 * line["step"] for line in found)
    asks = (tmp_path / "run/metrics.jsonl").read_text().count("timers/init_logprobs")
    assert asks == (25 if reference == "initial" else 0)


def test_the_policy_begins_as_its_reference(asked: Callable, run: Callable, tmp_path: Path):
    """One update to a rollout: with the rollout's policy as the reference, every loss is ln 2."""
    few = {"trainer.ppo.max_steps": 3, "model.global_batch_size": 8, "model.dpo.reference": "rollout"}
    job = run(asked("run", **few), command=[ONLINE_DPO])
    assert job.process.returncode == 0, job.err[-3000:]
    for line in steps(tmp_path / "run"):
        assert line["train_optim/preference_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_killed_run_goes_on_bit_for_bit(asked: Callable, kill_and_resume: Callable, tmp_path: Path):
    kill_and_resume(lambda name: asked(name, **{"trainer.devices": 2}), command=[ONLINE_DPO], step=4)
    assert_same_learning(tmp_path / "killed", tmp_path / "whole")


def test_results_do_not_depend_on_the_layout(asked: Callable, run: Callable, tmp_path: Path):
    few = {"trainer.ppo.max_steps": 2, "trainer.ppo.save_interval": 0}
    for name, changed in (("one", {}), ("many", LAYOUTS[MIXED])):
        job = run(asked(name, **few, **changed), command=[ONLINE_DPO])
        assert job.process.returncode == 0, job.err[-3000:]
    for ours, theirs in zip(metrics(tmp_path / "many"), metrics(tmp_path / "one"), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            bound = 2e-5 if "logprob_difference" in name or "kl" in name else 1e-5
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=bound), name


def test_the_policy_is_its_own_judge(asked: Callable, run: Callable, tmp_path: Path):
    """Of random words the first digit is the score; which rank judges is of no matter, nor is the batch."""
    judged = {
        "trainer.ppo.rewards.rule.weight": 0,
        "trainer.ppo.rewards.self.judge.pattern": "'([0-9])'",
        "trainer.ppo.rewards.self.judge.high": 9,
        "trainer.ppo.rewards.self.judge.max_length": 24,
        "trainer.ppo.max_steps": 1,
        "trainer.ppo.save_interval": 0,
        "model.dpo.reference": "rollout",
        "trainer.ppo.rewards.self.judge.template": tmp_path / "ask.txt",
    }
    (tmp_path / "ask.txt").write_text("{prompt} {response} Score:")
    found = {}
    for name, changed in (("one", {"model.ppo.rollout_micro_batch_size": 7}), ("many", LAYOUTS[MIXED])):
        job = run(asked(name, **judged, **changed), command=[ONLINE_DPO])
        assert job.process.returncode == 0, job.err[-3000:]
        (found[name],) = steps(tmp_path / name)
    one, many = found["one"], found["many"]
    assert one["train_rollouts/rewards/self"] == many["train_rollouts/rewards/self"] > 0
    assert (
        one["train_rollouts/rewards"]
        == one["train_rollouts/rewards/self"]
        != one["train_rollouts/rewards/rule"]
    )
    assert one["train_rollouts/rewards_std"] == many["train_rollouts/rewards_std"] > 0


def test_a_question_that_the_model_has_no_room_for_is_refused(asked: Callable, run: Callable):
    job = run(asked("run", **{"trainer.ppo.rewards.self.judge": "{}"}), command=[ONLINE_DPO])
    assert job.process.returncode == 2
    assert "give a shorter trainer.ppo.rewards.self.judge.template" in job.err


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"trainer.ppo.advantage_estimator": "leave_one_out"}, "set trainer.ppo.advantage_estimator=null"),
        ({"trainer.ppo.reward_clip": 2}, "trainer.ppo.reward_clip=2.0 has no effect with"),
        ({"trainer.ppo.initial_policy_kl_penalty": 0.1}, "set trainer.ppo.initial_policy_kl_penalty=0.0"),
        (
            {"model.global_batch_size": 16},
            "gives 8 pairs, which is not a multiple of model.global_batch_size=16",
        ),
    ],
)
def test_what_cannot_be_is_refused(asked: Callable, run: Callable, changed: dict[str, object], problem: str):
    job = run(asked("run", **changed), command=[ONLINE_DPO])
    assert job.process.returncode == 2
    assert problem in job.err
