# SPDX-License-Identifier: Apache-2.0
"""Rejection sampling, end to end: the rule is learned from the best responses alone; a killed run goes on."""

from collections.abc import Callable
from pathlib import Path

from tests.functional.conftest import ROOT
from tests.functional.run_folder import assert_same_learning, metrics
from tests.functional.test_grpo import settings  # noqa: F401 - a fixture

RS = ROOT / "examples/nlp/gpt/train_gpt_rs.py"


def test_the_best_are_learned_from_and_a_killed_run_goes_on(
    settings: Callable,  # noqa: F811
    kill_and_resume: Callable,
    tmp_path: Path,
):
    asked = {
        "model.ppo.num_rollout_samples": 64,
        "model.ppo.num_responses_per_prompt": 16,
        "model.global_batch_size": 64,
        "trainer.ppo.top_n": 2,
        "trainer.ppo.mask_unfinished": False,  # the toy never ends
        "trainer.ppo.max_steps": 24,
        "trainer.devices": 2,
    }
    kill_and_resume(lambda name: settings(name, **asked), command=[RS], step=4)
    assert_same_learning(tmp_path / "killed", tmp_path / "whole")
    steps = [line for line in metrics(tmp_path / "whole") if "train_optim/loss" in line]
    rewards = [line["train_rollouts/rewards"] for line in steps]
    assert sum(rewards[-4:]) > 1.5 * sum(rewards[:4])
    assert steps[0]["train_rollouts/init_policy_kl"] == 0, "no second set of weights is asked"
