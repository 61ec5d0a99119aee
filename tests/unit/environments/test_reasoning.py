# SPDX-License-Identifier: Apache-2.0
"""Rows and scores of reasoning-gym."""

import json
import subprocess
import sys

import pytest

from nemo_aligner.environments import reasoning
from nemo_aligner.errors import UserError


def test_without_the_package_the_fix_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError) as found:
        next(reasoning.rows("chain_sum", size=1))
    assert found.value.fix == "pip install 'nemo-aligner[reasoning]'"


class TestWithThePackage:
    """It builds an extension from source, so that it's no part of the test extra."""

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("reasoning_gym", reason="needs pip install 'nemo-aligner[reasoning]'")

    @pytest.mark.parametrize("task", ["chain_sum", "spell_backward", "countdown", "syllogism"])
    def test_an_answer_is_right_and_another_is_not(self, task: str):
        for row in reasoning.rows(task, size=3, seed=1):
            row = json.loads(json.dumps(row))
            assert reasoning.right(response=f"So <answer> {row['answer']} </answer>.", row=row) == 1
            assert reasoning.right(response=row["answer"], row=row) == 1
            assert reasoning.right(response="<answer>no</answer>", row=row) < 1

    def test_rows_follow_from_the_seed(self):
        first, again, other = (list(reasoning.rows("chain_sum", size=4, seed=seed)) for seed in (1, 1, 2))
        assert first == again != other

    def test_the_command_writes_rows(self):
        command = [
            sys.executable,
            "-m",
            "nemo_aligner.environments.reasoning",
            "chain_sum",
            "size=2",
            "seed=1",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        rows = list(reasoning.rows("chain_sum", size=2, seed=1))
        assert list(map(json.loads, done.stdout.splitlines())) == json.loads(json.dumps(rows))
        done = subprocess.run([*command, "bars=2"], capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 1
        assert "reasoning-gym makes no chain_sum of" in done.stderr

    def test_a_row_of_no_task_is_refused(self):
        with pytest.raises(KeyError, match=r"no metadata\.source_dataset"):
            reasoning.right(response="4", row={"answer": "4"})
