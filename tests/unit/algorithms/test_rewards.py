# SPDX-License-Identifier: Apache-2.0
"""Rewards by Python functions: what they are called with, and how their failures are told."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_aligner.algorithms.ppo_config import RewardConfig
from nemo_aligner.algorithms.rewards import open_called, score_by_functions, weighted_sum
from nemo_aligner.algorithms.skips import NotFinite
from nemo_aligner.data.row import Row, TokenSequence
from nemo_aligner.errors import UserError
from nemo_aligner.parallel import world
from nemo_aligner.rollout_batch import Rollout

ONE = (TokenSequence(tokens=[1], loss_mask=[False]),)
PROMPTS = {
    4: Row(sequences=ONE, text="2+3=", extras={"text": "2+3=", "expected": "5"}),
    7: Row(sequences=ONE, text="1+1=", extras={"text": "1+1=", "expected": "2"}),
}


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with world.ensure_single_process():
        yield


def rollout() -> Rollout:
    """Two responses to the first prompt and one to the second; a response is the digits of its tokens."""
    tokens = torch.tensor([[1, 5, 0], [1, 6, 5], [1, 2, 0]])
    lengths = torch.tensor([2, 3, 2])
    return Rollout(
        tokens=tokens,
        loss_mask=(torch.arange(3) >= 1) & (torch.arange(3) < lengths[:, None]),
        lengths=lengths,
        prompt_lengths=torch.ones(3, dtype=torch.int64),
        finished=torch.ones(3, dtype=torch.bool),
        group=torch.tensor([4, 4, 7]),
        sampler_logprobs=torch.zeros(3, 3),
    )


def text(rollout: Rollout, row: int) -> str:
    return "".join(map(str, rollout.response(row)))


RULES = """
import time

def exact(*, prompt, response, tokens, row):
    assert prompt == row["text"]
    assert len(tokens) == len(response)
    return float(response == row["expected"])

def shortness(tokens, **_):
    return -len(tokens)

def spoil(row, **_):
    row.clear()
    return 0.0

def fails(**_):
    return 1 / 0

def odd(**_):
    return float("nan")

def none(**_):
    return None

def several(**_):
    return [1.0]

def stuck(response, **_):
    time.sleep(1000 if response == "65" else 0)
    return 1.0
"""


@pytest.fixture
def score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[dict, dict]]:
    """Scores the rollout by functions of RULES, with settings by name."""
    (tmp_path / "rules.py").write_text(RULES)
    monkeypatch.chdir(tmp_path)

    def call(**settings: dict[str, Any]) -> tuple[dict, dict]:
        named = {
            name: RewardConfig(**{"function": f"rules.{name}", "workers": 1} | given)
            for name, given in settings.items()
        }
        with open_called(named, setting="trainer.ppo.rewards.{}.{}") as functions:
            found = score_by_functions(functions, rollout(), PROMPTS, text=text)
        return tuple({name: x.tolist() for name, x in one.items()} for one in (found.rewards, found.reported))

    return call


def test_each_function_sees_a_response_and_the_row_of_its_prompt(score: Callable[..., tuple[dict, dict]]):
    rewards, lost = score(exact={}, shortness={})
    assert rewards == {"exact": [1.0, 0.0, 1.0], "shortness": [-1.0, -2.0, -1.0]}
    assert lost == {"exact_lost": [0.0] * 3, "shortness_lost": [0.0] * 3}


def test_a_function_cannot_change_a_row_for_the_next_one(score: Callable[..., tuple[dict, dict]]):
    rewards, _ = score(spoil={}, exact={})
    assert rewards["exact"] == [1.0, 0.0, 1.0]
    assert PROMPTS[4].extras["expected"] == "5"


def test_a_call_that_is_out_of_time_is_lost_alone(
    score: Callable[..., tuple[dict, dict]], caplog: pytest.LogCaptureFixture
):
    rewards, lost = score(stuck={"timeout": 0.5, "lost_reward": -2.0})
    assert rewards == {"stuck": [1.0, -2.0, 1.0]}
    assert lost == {"stuck_lost": [0.0, 1.0, 0.0]}
    assert "rewards.stuck: 1 of 3 calls are lost, with a reward of -2 each" in caplog.text
    assert "it took longer than 0.5 s" in caplog.text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fails", ": ZeroDivisionError: division by zero ("),
        ("odd", " gave nan"),
        ("none", " gave None"),
        ("several", " gave [1.0]"),
    ],
)
def test_a_function_that_fails_is_reported_with_its_row(
    score: Callable[..., tuple[dict, dict]], name: str, words: str
):
    with pytest.raises(NotFinite) as found:
        score(**{name: {}})
    assert f"trainer.ppo.rewards.{name}{words}" in found.value.error.problem
    assert "the row: {'text': '2+3=', 'expected': '5'}" in found.value.error.problem


def test_a_function_that_is_not_there_is_told_at_once(score: Callable[..., tuple[dict, dict]]):
    with pytest.raises(UserError, match=r"trainer.ppo.rewards.exact.function=rules.two cannot be imported"):
        score(exact={"function": "rules.two"})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"timeout": 0.0, "function": "a.b"}, "trainer.ppo.rewards.a.timeout"),
        ({"workers": 0, "function": "a.b"}, "trainer.ppo.rewards.a.workers"),
        ({"timeout": 1.0}, "has no effect without trainer.ppo.rewards.a.function"),
        ({"lost_reward": 1.0, "overlong_buffer": 3}, "has no effect without"),
    ],
)
def test_settings_of_a_reward_that_cannot_hold_are_refused(settings: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        RewardConfig(**settings).check("trainer.ppo.rewards.a")


def test_rewards_are_clipped_normalized_and_weighted():
    draw = np.random.default_rng(0)
    a, b, c = draw.normal(3.0, [[2.0], [50.0], [1.0]], (3, 40))
    found = weighted_sum(
        {name: torch.from_numpy(x) for name, x in (("a", a), ("b", b), ("c", c))},
        {"a": RewardConfig(clip=4.0, weight=0.5), "b": RewardConfig(clip=60.0, normalize=True, weight=2.0)},
    )
    clipped = b.clip(-60, 60)
    expected = 0.5 * a.clip(-4, 4) + 2 * (clipped - clipped.mean()) / clipped.std() + c
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    raw = weighted_sum({"b": torch.from_numpy(b)}, {"b": RewardConfig(normalize=True)}, normalizes=False)
    np.testing.assert_array_equal(raw.numpy(), b)


def test_equal_rewards_are_normalized_to_0():
    equal = {"a": torch.full((4,), 0.1)}
    assert weighted_sum(equal, {"a": RewardConfig(normalize=True)}).abs().max() < 1e-3
