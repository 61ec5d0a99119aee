# SPDX-License-Identifier: Apache-2.0
"""Scores in evaluations: which number is one, and the mean of several."""

import pytest

from nemo_aligner.algorithms.ppo_config import JudgeConfig
from nemo_aligner.environments.evaluation import PATTERN, mean_score, read_score, read_template
from nemo_aligner.errors import UserError


@pytest.mark.parametrize(
    ("evaluation", "score"),
    [
        ("It helps. Score: 4", 4.0),
        ("score: 3.5 out of 5", 3.5),
        ("Score: 1, no: Score:2", 2.0),  # the last one counts
        ("Score: 7", 7.0),
        ("Score: good", None),
        ("", None),
    ],
)
def test_the_last_score_of_an_evaluation_counts(evaluation: str, score: float | None):
    assert read_score(evaluation, PATTERN) == score


def test_a_reward_is_the_mean_of_the_scores_there_are():
    assert mean_score([4.0, None, 7.0, 1.0], low=0.0, high=5.0) == 2.5, "7 is beyond the highest"
    assert mean_score([None, None], low=1.0, high=5.0) == 1.0


def test_a_template_names_both_texts(tmp_path):
    (tmp_path / "ask.txt").write_text("{prompt}?")
    with pytest.raises(UserError, match=r"has no \{response\}"):
        read_template(str(tmp_path / "ask.txt"), setting="judge.template")
    assert "{response}" in read_template(None, setting="judge.template")


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"pattern": "(a)(b)"}, "2 groups"),
        ({"pattern": "("}, "is no regular expression"),
        ({"low": 5.0}, "is not below"),
        ({"evaluations": 0}, "evaluations=0"),
    ],
)
def test_what_cannot_judge_is_refused(changed: dict[str, object], problem: str):
    with pytest.raises(UserError, match=problem):
        JudgeConfig(**changed).check("judge")
