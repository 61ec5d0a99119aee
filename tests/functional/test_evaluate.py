# SPDX-License-Identifier: Apache-2.0
"""evaluate.py as people run it: figures that the written responses bear out, at every layout."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_aligner.algorithms.evaluation import pass_at_k
from nemo_aligner.environments.rules import final_result

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/nlp/gpt/evaluate.py"


@pytest.fixture
def asked(nemo: Path, tmp_path: Path) -> dict[str, object]:
    """Questions, and a rule by which some responses are right."""
    rows = [{"question": f"{i}+{i}=", "sum": "x"} for i in range(6)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "early.py").write_text(
        "def score(response, row, tokens, least, **_):\n    return float(sum(tokens) % 5 >= least)\n"
    )
    return {
        "model.restore_from_path": nemo,
        "trainer.precision": 32,
        "input_file": tmp_path / "questions.jsonl",
        "output_file": tmp_path / "responses.jsonl",
        "sampling.max_length": 3,
        "num_samples": 4,
        "reward_function": "early.score",
        "reward_arguments": "{least: 3}",
    }


def test_figures_are_of_the_responses(asked: dict[str, object], tmp_path: Path, run: Callable):
    job = run(asked, command=(SCRIPT,))
    assert job.process.returncode == 0, job.err[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    summary = json.loads((tmp_path / "responses.summary.json").read_text())
    groups = [rows[i : i + 4] for i in range(0, 24, 4)]
    right = [sum(row["reward"] for row in group) for group in groups]
    assert 0 < sum(right) < 24, "some are right and some are not"
    assert (summary["prompts"], summary["samples"]) == (6, 4)
    assert list(summary["figures"]) == ["reward", "pass@1", "pass@2", "pass@4", "majority@4"]
    for k in (1, 2, 4):
        expected = sum(pass_at_k(4, int(c), k) for c in right) / 6
        assert summary["figures"][f"pass@{k}"]["mean"] == pytest.approx(expected)
    assert summary["finished"] == sum(row["finished"] for row in rows) / 24
    assert f"pass@1         {summary['figures']['pass@1']['mean']:.4f} ± " in job.out
    assert all(isinstance(final_result(row["answer"]), str) for row in rows)

    two = asked | {"output_file": tmp_path / "two.jsonl", "trainer.devices": 2}
    job = run(two, command=(SCRIPT,))
    assert job.process.returncode == 0, job.err[-3000:]
    assert json.loads((tmp_path / "two.summary.json").read_text()) == summary
    (tmp_path / "two.jsonl").unlink()
    again = run(two, command=(SCRIPT,))
    assert again.process.returncode == 2
    assert "two.summary.json exists" in again.err


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"reward_function": "null"}, "needs to know which responses are right"),
        ({"pass_at": "[1,8]"}, "pass_at=8 is more than num_samples=4"),
        ({"top_n": 1}, "leaves responses out that are counted"),
        ({"input_file": "null", "output_file": "null"}, "asks a file of prompts"),
        ({"reward_arguments": "{}"}, "missing 1 required positional argument: 'least'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    asked: dict[str, object], run: Callable, changed: dict[str, object], problem: str
):
    if "reward_function" in changed:
        asked.pop("reward_arguments")
    job = run(asked | changed, command=(SCRIPT,))
    assert job.process.returncode == 2
    assert problem in job.err


def test_an_environment_is_played(asked: dict[str, object], tmp_path: Path, run: Callable):
    """The rewards are those of its turns, at every layout; each line has the whole conversation."""
    (tmp_path / "games.py").write_text(
        "class Echo:\n"
        "    def reset(self, row, seed):\n"
        "        self.turns = 0\n"
        "    def step(self, turn):\n"
        "        self.turns += 1\n"
        "        return f' [{len(turn)}] ', 0.25\n"
    )
    game = {
        "reward_function": "null",
        "reward_arguments": "{}",
        "reward_environment": "games.Echo",
        "reward_max_turns": 3,
        "sampling.max_length": 12,
        "sampling.end_strings": f"[{', '.join(map(repr, 'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ'))}]",
        "right_from": 0.75,
    }
    found = []
    for ranks in (1, 2):
        out = tmp_path / f"game{ranks}.jsonl"
        job = run(asked | game | {"output_file": out, "trainer.devices": ranks}, command=(SCRIPT,))
        assert job.process.returncode == 0, job.err[-3000:]
        found.append([json.loads(line) for line in out.read_text().splitlines()])
    assert [row["answer"] for row in found[0]] == [row["answer"] for row in found[1]]
    assert [row["reward"] for row in found[0]] == [row["reward"] for row in found[1]]
    for row in found[0]:
        replies = row["conversation"].count("] ")
        assert row["reward"] / 0.25 in (replies, replies + 1), (
            "the turn of the last token has no room for a reply"
        )
        assert not row["finished"] or row["reward"] == 0.75
    assert {0.5, 0.75} <= {row["reward"] for row in found[0]}
