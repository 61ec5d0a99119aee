# SPDX-License-Identifier: Apache-2.0
"""Short names and files become words that Hydra reads as they were meant."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from nemo_aligner.config.base import TrainingJob
from nemo_aligner.config.reward import RMJob
from nemo_aligner.config.sft import SFTJob
from nemo_aligner.config.short_names import short_names
from nemo_aligner.errors import UserError
from nemo_aligner.launch.command import find_commands, load_script
from nemo_aligner.launch.ppo_jobs import words_of_jobs
from nemo_aligner.launch.script import Script, compose
from nemo_aligner.launch.words import full_words
from nemo_aligner.settings import parse


def composed(command: str, *words: str) -> dict[str, Any]:
    script = load_script(find_commands()[command])
    return compose(script, full_words(words, script.kind))


def test_full_keys_and_flags_stay_as_they_are():
    words = ["model.optim.lr=1", "++model.num_layers=2", "~model.peft", "--cfg", "job", "name=x"]
    assert full_words(words, SFTJob)[-len(words) :] == words


def test_what_a_command_sets_by_itself_is_no_mistake():
    """Whatever the learning rate, and with nothing but what has no default."""
    for name, file in find_commands().items():
        script = load_script(file)
        if not (isinstance(script, Script) and issubclass(script.kind, TrainingJob)):
            continue
        given = {
            key: "x"
            for key in ("model", "data", "out", "teacher", "reward")
            if key in short_names(script.kind)
        }
        for more in ({}, {"lr": "1e-7"}):
            words = [f"{key}={value}" for key, value in {**given, **more}.items()]
            parse(OmegaConf.create(composed(name, *words)), script.kind).check()


def test_short_names_in_order_so_that_the_last_one_counts():
    assert full_words(["lr=1", "tp=2", "lr=2"], RMJob)[-3:] == [
        "model.optim.lr=1",
        "model.tensor_model_parallel_size=2",
        "model.optim.lr=2",
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "it's, [1].jsonl", "a b=c.jsonl", "2025_06_01", "~/rows.jsonl"])
def test_files_of_any_name(name: str):
    values = composed("rm", f"data={name}", "validation=0.1")["model"]["data"]["data_prefix"]
    assert values == {"train": name, "validation": 0.1}


def test_lists_of_files():
    values = composed("rm", "data=[0.3, a.jsonl, 0.7, b.jsonl]")["model"]["data"]["data_prefix"]
    assert values == {"train": [0.3, "a.jsonl", 0.7, "b.jsonl"]}


def test_a_file_says_whatever_yaml_can(tmp_path: Path):
    values = {
        "name": "it's a=b, [x]",
        "model": {
            "restore_from_path": None,
            "optim": {"lr": 1e-7, "betas": [0.9, 0.95]},
            "data": {"data_prefix": {"train": ["a, b.jsonl", "c'.jsonl"]}, "add_bos": True},
            "num_layers": 3,
        },
    }
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(values | {"model": values["model"]}))
    del values["model"]["restore_from_path"]
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(values))
    found = composed("rm", "--config", str(tmp_path / "my.yaml"), "name=other")
    assert found["name"] == "other"
    assert found["model"]["optim"]["lr"] == 1e-7
    assert found["model"]["optim"]["betas"] == [0.9, 0.95]
    assert found["model"]["data"]["data_prefix"] == values["model"]["data"]["data_prefix"]
    assert found["model"]["num_layers"] == 3


@pytest.mark.parametrize("content", ["- a\n", "a: [", "a: 1\na: 2\n"])
def test_a_file_that_is_no_block_of_keys_is_refused(content: str, tmp_path: Path):
    path = tmp_path / "my.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"my\.yaml"):
        full_words(["--config", str(path)], SFTJob)


def test_words_of_ppo_go_to_their_jobs():
    commands = find_commands()
    words = ["model=sft", "reward_model=rm", "critic.tp=2", "lr=1e-6", "critic.CUDA_VISIBLE_DEVICES=4"]
    found = words_of_jobs(words, lambda file: load_script(commands["ppo"].with_name(file)).kind)
    assert sorted(found) == [
        "actor.model.optim.lr=1e-6",
        "actor.pretrained_checkpoint.restore_from_path=sft",
        "critic.CUDA_VISIBLE_DEVICES=4",
        "critic.model.tensor_model_parallel_size=2",
        "critic.pretrained_checkpoint.restore_from_path=rm",
    ]
