# SPDX-License-Identifier: Apache-2.0
"""Policy gradients without a critic: one job, rewards by Python functions or by a served reward model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_aligner.launch.job_group import free_ports
from tests.functional.conftest import LAYOUTS
from tests.functional.ppo_pair import ACTOR, LONG, Pair
from tests.functional.run_folder import assert_same_learning, metrics

RULES = """
def vowels(*, response, **_):
    return sum(letter in "aeiou" for letter in response) / 4


def asked(*, response, row, prompt, tokens):
    assert prompt == row["text"]
    return float(row["wanted"] in response)
"""


@pytest.fixture
def alone(start: Callable, nemo: Path, reward_nemo: Path, tmp_path: Path) -> Callable[..., dict[str, object]]:
    """Settings of an actor that is alone, in a folder of the name."""
    (tmp_path / "rules.py").write_text(RULES)
    rows = [{"text": f"User: thing {i}?\n\nAssistant:", "wanted": "aei"[i % 3]} for i in range(24)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(name: str, **changed: object) -> dict[str, object]:
        pair = Pair(folder=tmp_path / name, start=start, nemo=nemo, reward_nemo=reward_nemo)
        settings = {k: v for k, v in pair._actor().items() if not k.startswith("remote_critic_rm")}
        settings |= {
            "model.data.data_prefix": f"{{train: [{prompts}], validation: [{prompts}], test: [{prompts}]}}",
            "remote_critic_rm": "null",
            "trainer.ppo.advantage_estimator": "group",
            "model.ppo.num_responses_per_prompt": 4,
            "trainer.ppo.rewards.vowels.function": "rules.vowels",
            "trainer.ppo.rewards.asked.function": "rules.asked",
            "trainer.ppo.rewards.asked.weight": 0.5,
            "trainer.ppo.kl_placement": "loss",
            "trainer.ppo.kl_estimator": "k3",
            "trainer.ppo.adaptive_kl_target": "null",
            "trainer.ppo.scale_rewards": False,
        }
        return settings | changed

    return make


def test_rewards_by_functions_are_learned_from(alone: Callable, run: Callable, tmp_path: Path):
    job = run(alone("whole", **{"model.optim.lr": 3e-3, "trainer.ppo.max_steps": 30}), command=[ACTOR])
    assert job.process.returncode == 0, job.err[-3000:]
    steps = [line for line in metrics(tmp_path / "whole/actor") if "train_optim/loss" in line]
    assert len(steps) == 30
    for line in steps:
        parts = line["train_rollouts/rewards/vowels"] + 0.5 * line["train_rollouts/rewards/asked"]
        assert line["train_rollouts/rewards"] == pytest.approx(parts, abs=1e-6)
        assert "train_critic/loss" not in line
        assert line["train_optim/scaled_kl"] >= 0
    first, last = ([line["train_rollouts/rewards"] for line in part] for part in (steps[:5], steps[-5:]))
    assert sum(last) > 1.5 * sum(first)
    rows = [json.loads(line) for line in (tmp_path / "whole/actor/table_train_rollouts.jsonl").open()]
    assert len({row["prompt"] for row in rows[:4]}) == 1, "four responses to one prompt"
    assert len({row["response"] for row in rows[:4]}) > 1


@pytest.mark.parametrize(
    "estimator",
    [
        "group",
        *(
            pytest.param(name, marks=pytest.mark.resume)
            for name in ("leave_one_out", "reinforce", "best_of_n")
        ),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(
    alone: Callable, kill_and_resume: Callable, tmp_path: Path, estimator: str
):
    asked = {"trainer.ppo.advantage_estimator": estimator, "trainer.ppo.max_steps": 12}
    kill_and_resume(lambda name: alone(name, **asked), command=[ACTOR], step=4)
    assert_same_learning(tmp_path / "killed/actor", tmp_path / "whole/actor")


def test_results_do_not_depend_on_the_layout(alone: Callable, run: Callable, tmp_path: Path):
    few = {"trainer.ppo.max_steps": 2, "trainer.ppo.save_interval": 0, "trainer.ppo.val_check_interval": 2}
    found = {}
    for layout, changed in ({"one rank": {}} | LAYOUTS).items():
        job = run(alone(layout, **few, **changed), command=[ACTOR])
        assert job.process.returncode == 0, job.err[-3000:]
        found[layout] = metrics(tmp_path / layout / "actor")
    for layout in LAYOUTS:
        for ours, theirs in zip(found[layout], found["one rank"], strict=True):
            assert ours.keys() == theirs.keys()
            for name in ours:
                bound = 2e-5 if "logprob_difference" in name or "kl" in name else 1e-6
                assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=bound), (layout, name)


def test_a_served_reward_model_beside_a_function(
    alone: Callable, start: Callable, nemo: Path, reward_nemo: Path, tmp_path: Path
):
    port = free_ports(1)[0]
    pair = Pair(folder=tmp_path / "served", start=start, nemo=nemo, reward_nemo=reward_nemo)
    server = pair.serve_reward_model(port)
    settings = {k: v for k, v in alone("served").items() if k != "remote_critic_rm"} | {
        "remote_critic_rm.reward_model.ip": "127.0.0.1",
        "remote_critic_rm.reward_model.port": port,
        "remote_critic_rm.reward_model.stop_at_end": True,
        "trainer.ppo.rewards.model.weight": 2,
        "trainer.ppo.max_steps": 2,
    }
    actor = start(settings, command=[ACTOR])
    assert actor.wait(timeout=LONG) == 0, actor.err[-3000:]
    assert server.wait(timeout=60) == 0, server.err[-3000:]
    for line in metrics(pair.actor_folder):
        if "train_optim/loss" in line:
            parts = [line[f"train_rollouts/rewards/{name}"] for name in ("vowels", "asked", "model")]
            blend = parts[0] + 0.5 * parts[1] + 2 * parts[2]
            assert line["train_rollouts/rewards"] == pytest.approx(blend, abs=1e-5)


def test_several_served_reward_models(
    alone: Callable, start: Callable, nemo: Path, reward_nemo: Path, tmp_path: Path
):
    """One of remote_critic_rm and one of its own, which two rewards ask: all three give the same."""
    ports = free_ports(2)
    pair = Pair(folder=tmp_path / "served", start=start, nemo=nemo, reward_nemo=reward_nemo)
    servers = [pair.serve_reward_model(port) for port in ports]
    settings = {k: v for k, v in alone("served").items() if k != "remote_critic_rm"} | {
        "remote_critic_rm.reward_model.ip": "127.0.0.1",
        "remote_critic_rm.reward_model.port": ports[0],
        "remote_critic_rm.reward_model.stop_at_end": True,
        "trainer.ppo.rewards.first.weight": 2,
        "trainer.ppo.rewards.second.server": f"{{ip: 127.0.0.1, port: {ports[1]}, stop_at_end: True}}",
        "trainer.ppo.rewards.third.server": f"{{ip: 127.0.0.1, port: {ports[1]}}}",
        "trainer.ppo.rewards.third.weight": -1,
        "trainer.ppo.rewards.third.rows": "{wanted: a}",
        "trainer.ppo.max_steps": 2,
    }
    actor = start(settings, command=[ACTOR])
    assert actor.wait(timeout=LONG) == 0, actor.err[-3000:]
    for server in servers:
        assert server.wait(timeout=60) == 0, server.err[-3000:]
    steps = [line for line in metrics(pair.actor_folder) if "train_optim/loss" in line]
    assert len(steps) == 2
    for line in steps:
        first, second = (line[f"train_rollouts/rewards/{name}"] for name in ("first", "second"))
        assert first == pytest.approx(second, abs=1e-6)
    assert any("train_rollouts/rewards/third" in line for line in steps)


def test_a_reward_server_that_is_not_there_is_named(alone: Callable, run: Callable):
    (port,) = free_ports(1)
    server = f"{{ip: 127.0.0.1, port: {port}, start_timeout: 1}}"
    job = run(alone("refused", **{"trainer.ppo.rewards.model.server": server}), command=[ACTOR])
    assert job.process.returncode == 2
    assert "trainer.ppo.rewards.model.server" in job.err
    assert "serve_reward_model.py" in job.err


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"trainer.ppo.rewards.model.server.start_timeout": 0},
            "trainer.ppo.rewards.model.server.start_timeout=0",
        ),
        ({"trainer.ppo.advantage_estimator": "gae"}, "advantage_estimator=gae asks a critic"),
        ({"model.ppo.num_responses_per_prompt": 1}, "compares responses to one prompt"),
        (
            {"model.ppo.num_responses_per_prompt": 3},
            "is not a multiple of model.ppo.num_responses_per_prompt=3",
        ),
        ({"trainer.ppo.rewards.third.weight": 1}, "trainer.ppo.rewards has a served reward model"),
        ({"trainer.ppo.rewards.vowels.weights": 1}, "unknown key trainer.ppo.rewards.vowels.weights"),
        ({"trainer.ppo.critic_warmup_steps": 1}, "critic_warmup_steps=1"),
        (
            {"trainer.ppo.rewards.vowels.function": "rules.missing"},
            "trainer.ppo.rewards.vowels.function=rules.missing cannot",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(
    alone: Callable, run: Callable, changed: dict[str, object], words: str
):
    job = run(alone("refused", **changed), command=[ACTOR])
    assert job.process.returncode == 2
    assert words in job.err
    assert "Fix: " in job.err
