# SPDX-License-Identifier: Apache-2.0
"""GRPO, end to end, without a critic: what is learned, kills, layouts, both means of the loss."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.functional.conftest import LAYOUTS, MIXED, ROOT
from tests.functional.run_folder import assert_same_learning, metrics

GRPO = ROOT / "examples/nlp/gpt/train_gpt_grpo.py"
RULE = """
def score(prompt, response, row, **_):
    assert prompt == row["text"]
    return sum(letter in row["wanted"] for letter in response) / 8
"""


def toy_run(nemo: Path, prompts: Path, folder: Path) -> dict[str, object]:
    """Settings of a run without its rewards."""
    return {
        "pretrained_checkpoint.restore_from_path": nemo,
        "model.data.data_prefix": f"{{train: [{prompts}], validation: [{prompts}]}}",
        "model.ppo.num_rollout_samples": 32,
        "model.ppo.num_responses_per_prompt": 4,
        "model.ppo.num_val_samples": 8,
        "model.ppo.length_params.max_length": 8,
        "model.ppo.rollout_micro_batch_size": 16,
        "model.global_batch_size": 16,
        "model.micro_batch_size": 4,
        "model.optim.lr": 3e-3,
        "model.optim.sched.warmup_steps": 0,
        "trainer.precision": 32,
        "trainer.ppo.max_steps": 8,
        "trainer.ppo.save_interval": 2,
        "trainer.ppo.val_check_interval": 4,
        "exp_manager.explicit_log_dir": folder,
        "exp_manager.create_tensorboard_logger": False,
    }


@pytest.fixture
def settings(nemo: Path, tmp_path: Path) -> Callable[..., dict[str, object]]:
    """Settings of a toy run in a folder of the name."""
    (tmp_path / "my_rewards.py").write_text(RULE)
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"text": f"thing {i}:", "wanted": ("aeiou", "rstln")[i % 2]} for i in range(32)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(name: str, **changed: object) -> dict[str, object]:
        rule = {"trainer.ppo.rewards.rule.function": "my_rewards.score"}
        return toy_run(nemo, prompts, tmp_path / name) | rule | changed

    return make


def test_a_rule_is_learned(settings: Callable, run: Callable, tmp_path: Path):
    asked = {
        "model.ppo.loss_mean": "sequence",
        "trainer.ppo.max_steps": 25,
        "trainer.ppo.val_before_train": True,
    }
    job = run(settings("run", **asked), command=[GRPO])
    assert job.process.returncode == 0, job.err[-3000:]
    steps = [line for line in metrics(tmp_path / "run") if "train_optim/loss" in line]
    rewards = [line["train_rollouts/rewards"] for line in steps]
    assert sum(rewards[-5:]) > 2 * sum(rewards[:5])
    assert all(line["train_optim/scaled_kl"] >= 0 for line in steps)
    assert all("train_critic/loss" not in line for line in steps)
    first, *_, last = [line for line in metrics(tmp_path / "run") if "val_rollouts/win_rate" in line]
    assert (first["step"], first["val_rollouts/win_rate"]) == (0, 0.5), "the initial policy beside itself"
    assert last["val_rollouts/win_rate"] > 0.7
    assert "tritonserver" not in job.err
    # Rewards of other prompts are not compared with those of the initial policy.
    train, other = tmp_path / "prompts.jsonl", tmp_path / "other.jsonl"
    other.write_text("".join(reversed(train.read_text().splitlines(keepends=True))))
    asked["trainer.ppo.max_steps"] = 26
    asked["model.data.data_prefix"] = f"{{train: [{train}], validation: [{other}]}}"
    job = run(settings("run", **asked), command=[GRPO])
    assert job.process.returncode == 0, job.err[-3000:]
    end = metrics(tmp_path / "run")[-1]
    assert (end["step"], "val_rollouts/rewards" in end, "val_rollouts/win_rate" in end) == (26, True, False)


def test_a_killed_run_goes_on_bit_for_bit(settings: Callable, kill_and_resume: Callable, tmp_path: Path):
    asked = {"trainer.devices": 2, "trainer.ppo.val_before_train": True}
    kill_and_resume(lambda name: settings(name, **asked), command=[GRPO], step=4)
    assert_same_learning(tmp_path / "killed", tmp_path / "whole")


def assert_close_metrics(found: Path, wanted: Path) -> None:
    for ours, theirs in zip(metrics(found), metrics(wanted), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            bound = 2e-5 if "logprob_difference" in name or "kl" in name else 2e-6
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=bound), name


def test_results_do_not_depend_on_the_layout(settings: Callable, run: Callable, tmp_path: Path):
    few = {"trainer.ppo.max_steps": 2, "trainer.ppo.save_interval": 0, "model.ppo.loss_mean": "sequence"}
    for name, changed in (("one", {}), ("many", LAYOUTS[MIXED])):
        job = run(settings(name, **few, **changed), command=[GRPO])
        assert job.process.returncode == 0, job.err[-3000:]
    assert_close_metrics(tmp_path / "many", tmp_path / "one")


def test_without_a_reward_the_fix_is_named(settings: Callable, run: Callable):
    asked = {name: value for name, value in settings("run").items() if "rewards" not in name}
    job = run(asked, command=[GRPO])
    assert job.process.returncode == 2
    assert "trainer.ppo.rewards.NAME.function=MODULE.NAME" in job.err


DAPO = {"recipe": "dapo", "trainer.ppo.max_sampling_rounds": 3, "trainer.ppo.val_check_interval": 0}
# Of two prompts in three all responses have one reward.
UNEQUAL = """
def score(response, row, **_):
    return float("e" in response) if row["wanted"] == "aeiou" and "1" in row["text"] else 0.5
"""


def test_dynamic_sampling_is_killed_and_goes_on_bit_for_bit(
    settings: Callable, kill_and_resume: Callable, tmp_path: Path
):
    (tmp_path / "my_rewards.py").write_text(UNEQUAL)
    kill_and_resume(lambda name: settings(name, **DAPO), command=[GRPO], step=4)
    assert_same_learning(tmp_path / "killed", tmp_path / "whole")
    steps = [line for line in metrics(tmp_path / "whole") if "train_rollouts/accept_rate" in line]
    taken = [line["train_rollouts/sampling_rounds"] for line in steps]
    assert max(taken) == 3
    assert all(0 < line["train_rollouts/accept_rate"] < 1 for line in steps)
    # 32 prompts are 4 batches of 8.
    assert [line["train_rollouts/epoch"] for line in steps] == [
        1 + (sum(taken[:number]) - 1) // 4 for number in range(1, len(taken) + 1)
    ]
    assert all(line["train_rollouts/rollout_size"] == 32 for line in steps)
    assert all(-1 <= line["train_rollouts/rewards/overlong"] <= 0 for line in steps)


def test_dynamic_sampling_does_not_depend_on_the_layout(settings: Callable, run: Callable, tmp_path: Path):
    (tmp_path / "my_rewards.py").write_text(UNEQUAL)
    few = {"trainer.ppo.max_steps": 2, "trainer.ppo.save_interval": 0}
    for name, changed in (("one", {}), ("many", LAYOUTS[MIXED])):
        job = run(settings(name, **DAPO, **few, **changed), command=[GRPO])
        assert job.process.returncode == 0, job.err[-3000:]
    assert_close_metrics(tmp_path / "many", tmp_path / "one")


def test_where_all_rewards_are_equal_a_warning_says_so(settings: Callable, run: Callable, tmp_path: Path):
    (tmp_path / "my_rewards.py").write_text("def score(**_):\n    return 0.5\n")
    # The length alone would be a reward that differs.
    asked = DAPO | {"trainer.ppo.max_steps": 1, "trainer.ppo.rewards.overlong.weight": 0}
    job = run(settings("run", **asked), command=[GRPO])
    assert job.process.returncode == 0, job.err[-3000:]
    assert "trainer.ppo.max_sampling_rounds=3 batches of prompts, their mean is 0.5" in job.err
    assert metrics(tmp_path / "run")[0]["train_rollouts/accept_rate"] == 0


def test_dynamic_sampling_without_groups_is_refused(settings: Callable, run: Callable):
    asked = {"trainer.ppo.advantage_estimator": "reinforce", "trainer.ppo.max_sampling_rounds": 2}
    job = run(settings("run", **asked), command=[GRPO])
    assert job.process.returncode == 2
    assert "trainer.ppo.max_sampling_rounds=2 replaces groups of equal rewards" in job.err


@pytest.mark.parametrize("recipe", ["cispo", "gspo", "reinforce_plus_plus", "rloo"])
def test_recipes_run(settings: Callable, run: Callable, tmp_path: Path, recipe: str):
    asked = {"recipe": recipe, "trainer.ppo.max_steps": 2, "trainer.ppo.val_check_interval": 0}
    job = run(settings("run", **asked), command=[GRPO])
    assert job.process.returncode == 0, job.err[-3000:]
    first, *_ = metrics(tmp_path / "run")
    assert first["train_optim/grad_norm"] > 0
