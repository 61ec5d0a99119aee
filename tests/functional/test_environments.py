# SPDX-License-Identifier: Apache-2.0
"""GRPO with environments of several turns: what is learned, kills, layouts, rows of several kinds, what goes wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from string import ascii_letters

import psutil
import pytest

from tests.functional.conftest import LAYOUTS, MIXED, ROOT
from tests.functional.ppo_pair import Pair
from tests.functional.run_folder import assert_same_learning, metrics
from tests.functional.test_grpo import assert_close_metrics, toy_run

GRPO = ROOT / "examples/nlp/gpt/train_gpt_grpo.py"
CODE = """
import os, time

class Letters:
    '''Replies with the seed and the turn's length; a reward for each letter that is odd, or even; ends by the seed.'''

    def __init__(self, turns=3, key="wanted"):
        self.turns, self.key, self.count = turns, key, 0

    def reset(self, row, seed):
        self.row, self.seed = row, seed

    def step(self, turn):
        self.count += 1
        over = self.count == self.turns or len(turn) % 5 == self.seed % 5
        reward = sum(ord(letter) % 2 == (self.row[self.key] == 1) for letter in turn) / 8
        return None if over else f" {self.seed % 97} {len(turn)}:", reward

class Bad(Letters):
    def step(self, turn):
        reply = super().step(turn)
        if "1" in self.row["text"]:
            match self.row["does"]:
                case "raise":
                    return 1 / 0
                case "nan":
                    return None, float("nan")
                case "reply":
                    return None
                case "empty":
                    return "", 0.0
                case "half":
                    return "\\ud800 and", 0.5
                case "crash":
                    os._exit(1)
                case "hang":
                    time.sleep(1000)
                case "host":
                    os.kill(os.getppid(), 9)
                    time.sleep(1000)
        return reply

def length(response, **_):
    return len(response) / 8
"""


@pytest.fixture
def settings(nemo: Path, tmp_path: Path) -> Callable[..., dict[str, object]]:
    """Settings of a toy run in a folder of the name."""
    (tmp_path / "games.py").write_text(CODE)
    prompts = tmp_path / "prompts.jsonl"

    def make(name: str, does: str = "", **changed: object) -> dict[str, object]:
        rows = [{"text": f"thing {i}:", "wanted": i % 2, "does": does} for i in range(32)]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        game = {
            "trainer.ppo.rewards.game.environment": "games.Letters",
            "model.ppo.length_params.max_length": 12,
            "model.ppo.sampling_params.end_strings": f"[{', '.join(map(repr, ascii_letters))}]",
        }
        return toy_run(nemo, prompts, tmp_path / name) | game | changed

    return make


def test_a_run_is_rewarded_by_its_turns(settings: Callable, run: Callable, tmp_path: Path):
    job = run(settings("run", **{"trainer.ppo.max_steps": 2}), command=[GRPO])
    assert job.process.returncode == 0, job.err[-3000:]
    steps = [line for line in metrics(tmp_path / "run") if "train_optim/loss" in line]
    assert all(line["train_rollouts/rewards/game"] > 0 for line in steps)
    assert all(1 < line["train_rollouts/rewards/game_turns"] <= 3 for line in steps)
    assert all(line["train_rollouts/logprob_difference_max"] < 1e-4 for line in steps)


def test_episodes_wait_for_a_process_where_there_are_fewer(settings: Callable, run: Callable, tmp_path: Path):
    few = {"trainer.ppo.max_steps": 2, "trainer.ppo.save_interval": 0}
    for name, changed in (
        ("each", {}),
        ("two", {"trainer.ppo.rewards.game.workers": 2}),
        ("async", {"trainer.ppo.rewards.game.workers": 2, "trainer.ppo.async_turns": True}),
    ):
        job = run(settings(name, **few, **changed), command=[GRPO])
        assert job.process.returncode == 0, job.err[-3000:]
    assert_close_metrics(tmp_path / "two", tmp_path / "each")
    assert_close_metrics(tmp_path / "async", tmp_path / "each")


def test_a_killed_run_goes_on_bit_for_bit(settings: Callable, kill_and_resume: Callable, tmp_path: Path):
    kill_and_resume(lambda name: settings(name, **{"trainer.devices": 2}), command=[GRPO], step=4)
    assert_same_learning(tmp_path / "killed", tmp_path / "whole")


def test_results_do_not_depend_on_the_layout(settings: Callable, run: Callable, tmp_path: Path):
    few = {"trainer.ppo.max_steps": 2, "trainer.ppo.save_interval": 0}
    for name, changed in (("one", {}), ("many", LAYOUTS[MIXED])):
        job = run(settings(name, **few, **changed), command=[GRPO])
        assert job.process.returncode == 0, job.err[-3000:]
    assert_close_metrics(tmp_path / "many", tmp_path / "one")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("does", "problem"),
    [
        ("raise", "ZeroDivisionError: division by zero ("),
        ("nan", "ValueError: step returned the reward nan"),
        ("empty", "the reply '' has no tokens"),
        ("reply", "TypeError: step returned None, not (reply, reward)"),
    ],
)
def test_an_environment_that_fails_ends_the_run_on_every_rank(
    settings: Callable, run: Callable, ranks: int, does: str, problem: str
):
    asked = {"trainer.ppo.rewards.game.environment": "games.Bad", "trainer.devices": ranks}
    job = run(settings("run", does, **asked), command=[GRPO])
    assert job.process.returncode == 2
    assert f"trainer.ppo.rewards.game: {problem}" in job.err
    assert "the row: {'text': 'thing 1" in job.err
    assert "Traceback" not in job.err


@pytest.mark.parametrize(
    ("does", "why"), [("crash", "its process ended"), ("hang", "it took longer than 1 s")]
)
def test_an_environment_that_is_lost_harms_no_other(
    settings: Callable, run: Callable, tmp_path: Path, does: str, why: str
):
    asked = {
        "trainer.ppo.rewards.game.environment": "games.Bad",
        "trainer.ppo.rewards.game.timeout": 1,
        "trainer.ppo.rewards.game.lost_reward": -1,
        "trainer.ppo.max_steps": 1,
    }
    job = run(settings("run", does, **asked), command=[GRPO])
    assert job.process.returncode == 0, job.err[-3000:]
    assert f"Of the first, {why}" in job.err
    first, *_ = metrics(tmp_path / "run")
    assert 0 < first["train_rollouts/rewards/game_lost"] < 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_lost_host_of_environments_ends_the_run_and_leaves_no_process(
    settings: Callable, run: Callable, tmp_path: Path, ranks: int
):
    asked = {"trainer.ppo.rewards.game.environment": "games.Bad", "trainer.devices": ranks}
    job = run(settings("run", "host", **asked), command=[GRPO])
    assert job.process.returncode == 2
    assert "games.Bad: the process that starts its workers is lost: " in job.err
    assert "Traceback" not in job.err
    folder = str(tmp_path)
    assert not [one for one in psutil.process_iter(["cmdline", "cwd"]) if is_host_in(one, folder)]


def is_host_in(process: psutil.Process, folder: str) -> bool:
    return (
        "nemo_aligner.environments.host" in (process.info["cmdline"] or []) and process.info["cwd"] == folder
    )


def test_each_row_is_of_its_own_rewards(settings: Callable, run: Callable, tmp_path: Path):
    """Two environments, and one turn that a function rewards, in one file."""
    asked = {
        "trainer.ppo.rewards.game.rows": "{wanted: 0}",
        "trainer.ppo.rewards.short.environment": "games.Letters",
        "trainer.ppo.rewards.short.arguments": "{turns: 1}",
        "trainer.ppo.rewards.short.rows": "{wanted: 1, does: more}",
        "trainer.ppo.rewards.length.function": "games.length",
        "trainer.ppo.rewards.length.rows": "{does: single}",
        "trainer.ppo.max_steps": 4,
        "trainer.ppo.async_turns": True,
    }
    made = settings("run", **asked)
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        {"text": f"thing {i}:", **({"wanted": 0}, {"wanted": 1, "does": "more"}, {"does": "single"})[i % 3]}
        for i in range(36)
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = run(made, command=[GRPO])
    assert job.process.returncode == 0, job.err[-3000:]
    for line in metrics(tmp_path / "run"):
        if "train_optim/loss" in line:
            assert {"train_rollouts/rewards/game", "train_rollouts/rewards/length"} <= line.keys()
            assert line["train_rollouts/logprob_difference_max"] < 1e-4


def test_rows_that_match_no_prompt_are_reported(settings: Callable, run: Callable):
    asked = {
        "trainer.ppo.rewards.length.function": "games.length",
        "trainer.ppo.rewards.length.rows": "{asked_for: 1}",
        "trainer.ppo.max_steps": 1,
    }
    job = run(settings("run", **asked), command=[GRPO])
    assert job.process.returncode == 0, job.err[-3000:]
    assert "trainer.ppo.rewards.length.rows={'asked_for': 1} match none of 32 training prompts" in job.err
    assert "trainer.ppo.rewards.game.rows" not in job.err.split("command:")[1].split("\n", 1)[1]


def test_a_row_without_a_reward_and_one_of_two_environments_are_refused(settings: Callable, run: Callable):
    asked = {"trainer.ppo.rewards.game.rows": "{wanted: 0}"}
    job = run(settings("run", **asked), command=[GRPO])
    assert job.process.returncode == 2
    assert "responses have no reward, as trainer.ppo.rewards' rows leave them out" in job.err
    job = run(settings("run", **{"trainer.ppo.rewards.more.environment": "games.Letters"}), command=[GRPO])
    assert job.process.returncode == 2
    assert "trainer.ppo.rewards.game and trainer.ppo.rewards.more are both environments of the row" in job.err


def test_a_class_that_is_no_environment_is_refused(settings: Callable, run: Callable):
    job = run(settings("run", **{"trainer.ppo.rewards.game.environment": "games.length"}), command=[GRPO])
    assert job.process.returncode == 2
    assert "trainer.ppo.rewards.game.environment=games.length cannot be imported" in job.err
    assert "an environment has reset(row, seed) and step(turn)" in job.err


def test_ppo_with_a_critic_and_a_reward_model_learns_of_turns(
    settings: Callable, start: Callable, nemo: Path, reward_nemo: Path, tmp_path: Path
):
    settings("files")
    asked = {
        "trainer.ppo.rewards.game.environment": "games.Letters",
        "trainer.ppo.rewards.game.arguments": "{key: text}",
        "trainer.ppo.rewards.model.weight": 0.5,
        "trainer.ppo.max_steps": 3,
        "model.ppo.sampling_params.end_strings": f"[{', '.join(map(repr, ascii_letters))}]",
    }
    pair = Pair(
        folder=tmp_path / "pair", start=start, nemo=nemo, reward_nemo=reward_nemo, actor_settings=asked
    )
    pair.run()
    steps = [line for line in metrics(pair.actor_folder) if "train_optim/loss" in line]
    assert len(steps) == 3
    for line in steps:
        game, model = (line[f"train_rollouts/rewards/{name}"] for name in ("game", "model"))
        assert line["train_rollouts/rewards"] == pytest.approx(game + 0.5 * model, abs=1e-5)
        assert line["train_rollouts/rewards/game_turns"] > 1
        assert {"train_critic/loss", "train_rollouts/values_mean"} <= line.keys()


def test_dynamic_sampling_asks_the_environment_again(settings: Callable, run: Callable, tmp_path: Path):
    asked = {"recipe": "dapo", "trainer.ppo.max_sampling_rounds": 3, "trainer.ppo.max_steps": 3}
    job = run(settings("run", **asked), command=[GRPO])
    assert job.process.returncode == 0, job.err[-3000:]
    steps = [line for line in metrics(tmp_path / "run") if "train_optim/loss" in line]
    assert all(line["train_rollouts/rollout_size"] == 32 for line in steps)
    assert all(line["train_rollouts/rewards/game_turns"] > 1 for line in steps)


def test_half_a_surrogate_pair_in_a_reply_is_read(settings: Callable, run: Callable, tmp_path: Path):
    asked = {"trainer.ppo.rewards.game.environment": "games.Bad", "trainer.ppo.max_steps": 1}
    job = run(settings("run", "half", **asked), command=[GRPO])
    assert job.process.returncode == 0, job.err[-3000:]
    assert metrics(tmp_path / "run")[0]["train_rollouts/rewards"] > 0


def test_a_name_of_a_metric_is_refused(settings: Callable, run: Callable):
    asked = {"trainer.ppo.rewards.game_turns.function": "games.length"}
    job = run(settings("run", **asked), command=[GRPO])
    assert job.process.returncode == 2
    assert "trainer.ppo.rewards.game_turns has the name of a metric of trainer.ppo.rewards.game" in job.err
