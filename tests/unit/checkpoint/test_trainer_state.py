# SPDX-License-Identifier: Apache-2.0
"""A trainer_state.json that no run has written is refused by file and key."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from nemo_aligner.algorithms.critic_link import PPOState
from nemo_aligner.algorithms.critic_server_trainer import CriticState
from nemo_aligner.algorithms.supervised import SupervisedState
from nemo_aligner.checkpoint.trainer_state import TrainerState, find_checkpoints, read_checkpoint
from nemo_aligner.errors import UserError

WHOLE = asdict(TrainerState(step=6, consumed_samples=48, metrics={"val_loss": 1.5}, algorithm={"kl": {}}))


def stored(folder: Path, content: str) -> Path:
    path = folder / "x-step=6"
    path.mkdir()
    (path / "trainer_state.json").write_text(content)
    return path


def test_what_a_run_writes_is_read(tmp_path: Path):
    assert asdict(read_checkpoint(stored(tmp_path, json.dumps(WHOLE))).state) == WHOLE


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ("{}", '"step" is missing'),
        (WHOLE | {"step": "6"}, '"step" is "6", not a whole number'),
        (WHOLE | {"step": -5}, '"step" is -5, not a whole number'),
        (WHOLE | {"step": 6.0}, '"step" is 6.0, not a whole number'),
        (WHOLE | {"step": True}, '"step" is true, not a whole number'),
        (WHOLE | {"step": None}, '"step" is null, not a whole number'),
        ({k: v for k, v in WHOLE.items() if k != "consumed_samples"}, '"consumed_samples" is missing'),
        (WHOLE | {"data": None}, '"data" is null, not an object'),
        (WHOLE | {"metrics": []}, '"metrics" is \\[\\], not an object of numbers'),
        (WHOLE | {"metrics": {"val_loss": "low"}}, '"metrics" is .*, not an object of numbers'),
        (WHOLE | {"algorithm": "ppo"}, '"algorithm" is "ppo", not an object'),
        (WHOLE | {"more": 1}, '"more" is unknown'),
        ("[]", "it holds \\[\\], not an object"),
        ("null", "it holds null, not an object"),
    ],
    ids=str,
)
def test_what_no_run_writes_is_refused_by_file_and_key(tmp_path: Path, content: object, key: str):
    path = stored(tmp_path, content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=f"x-step=6/trainer_state.json is not what a run has written: {key}"):
        find_checkpoints(tmp_path)
    assert path.exists()


@pytest.mark.parametrize(
    "content", ["", "{", "\x00" * 99, "[" * 100_000, '{"step": ' + "9" * 5000 + "}"], ids=len
)
def test_what_is_no_json_is_refused(tmp_path: Path, content: str):
    with pytest.raises(UserError, match=r"trainer_state\.json in it cannot be read"):
        read_checkpoint(stored(tmp_path, content))


@pytest.mark.parametrize(
    ("kind", "algorithm", "key"),
    [
        (CriticState, {"sequence": "1"}, '"algorithm.sequence" is "1", not a whole number'),
        (CriticState, {"last_loss": "low"}, '"algorithm.last_loss" is "low", not a number'),
        (PPOState, {"kl": None}, '"algorithm.kl" is null, not an object of numbers'),
        (PPOState, {"kl": {}}, '"algorithm.reward_scaling" is missing'),
        (
            SupervisedState,
            {"unvalidated_step": True},
            '"algorithm.unvalidated_step" is true, not a whole number',
        ),
    ],
    ids=str,
)
def test_what_no_loop_writes_is_refused_by_file_and_key(
    tmp_path: Path, kind: type, algorithm: dict, key: str
):
    checkpoint = read_checkpoint(stored(tmp_path, json.dumps(WHOLE | {"algorithm": algorithm})))
    with pytest.raises(UserError, match=f"trainer_state.json is not what a run has written: {key}"):
        checkpoint.algorithm(kind)


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ({}, SupervisedState()),
        ({"unvalidated_step": 6}, SupervisedState(unvalidated_step=6)),
        ({"last_loss": 0.5, "is_half": False}, CriticState(last_loss=0.5, is_half=False)),
        ({"run_id": "x", "sequence": 2, "last_loss": 1}, CriticState(run_id="x", sequence=2, last_loss=1)),
        (
            {"ppo_optimization_step": 4, "kl": {}, "reward_scaling": {}},
            PPOState(kl={}, reward_scaling={}, ppo_optimization_step=4),
        ),
    ],
    ids=str,
)
def test_states_of_earlier_releases_are_read(tmp_path: Path, algorithm: dict, expected: object):
    path = stored(tmp_path, json.dumps(WHOLE | {"algorithm": algorithm}))
    assert read_checkpoint(path).algorithm(type(expected)) == expected
