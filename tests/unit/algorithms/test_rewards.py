# SPDX-License-Identifier: Apache-2.0
"""Rewards by Python functions: what they are called with, and how their failures are told."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nemo_aligner.algorithms.rewards import load_function, score_by_functions
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


def exact(*, prompt: str, response: str, tokens: list[int], row: dict) -> float:
    assert prompt == row["text"]
    assert len(tokens) == len(response)
    return float(response == row["expected"])


def test_each_function_sees_a_response_and_the_row_of_its_prompt():
    functions = {"exact": exact, "length": lambda tokens, **_: -len(tokens)}
    found = score_by_functions(functions, rollout(), PROMPTS, text=text)
    assert {name: rewards.tolist() for name, rewards in found.items()} == {
        "exact": [1.0, 0.0, 1.0],
        "length": [-1.0, -2.0, -1.0],
    }


def test_a_function_cannot_change_a_row_for_the_next_one():
    def spoil(row: dict, **_: object) -> float:
        row.clear()
        return 0.0

    score_by_functions({"spoil": spoil}, rollout(), PROMPTS, text=text)
    assert PROMPTS[4].extras["expected"] == "5"


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (
            lambda **_: 1 / 0,
            f"trainer.ppo.rewards.bad: ZeroDivisionError: division by zero ({__file__}, line ",
        ),
        (lambda **_: float("nan"), "trainer.ppo.rewards.bad gave nan"),
        (lambda **_: None, "trainer.ppo.rewards.bad: TypeError"),
        (lambda **_: [1.0], "trainer.ppo.rewards.bad: TypeError"),
    ],
)
def test_a_function_that_fails_is_reported_with_its_row(function, words: str):
    with pytest.raises(NotFinite) as found:
        score_by_functions({"bad": function}, rollout(), PROMPTS, text=text)
    assert words in found.value.error.problem


def test_functions_come_from_the_folder_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "rules_of_mine.py").write_text("def one(**_):\n    return 1.0\nlimit = 3\n")
    (tmp_path / "rules_broken.py").write_text("def one(:\n")
    monkeypatch.chdir(tmp_path)
    assert load_function("trainer.ppo.rewards.a.function", "rules_of_mine.one")() == 1.0
    for path, words in (
        ("rules_of_mine.two", "cannot be imported"),
        ("rules_of_mine.limit", "is no function"),
        ("rules_nowhere.one", "cannot be imported: No module named"),
        ("rules_broken.one", "cannot be imported"),
        ("one", "names no module"),
    ):
        with pytest.raises(UserError, match=words) as found:
            load_function("trainer.ppo.rewards.a.function", path)
        assert f"trainer.ppo.rewards.a.function={path}" in found.value.problem
        assert str(tmp_path) in found.value.fix
