# SPDX-License-Identifier: Apache-2.0
"""Docs name settings that there are; docs/RLHFTraining.md all of PPO's, with the defaults that the YAML files have."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_aligner.compatibility import ACCEPTED
from nemo_aligner.models.gpt.config import GPTConfig
from tests.architecture.test_readme import PAGES, name
from tests.architecture.test_yaml import keys

ROOT = Path(__file__).parents[2]
CONF = ROOT / "examples/nlp/gpt/conf"
PAGE = (ROOT / "docs/RLHFTraining.md").read_text()
BLOCKS = "trainer|model|remote_critic_rm|inference|exp_manager|pretrained_checkpoint|sampling"
# A key of one of these blocks, also behind a job's name as run_ppo.py takes it.
KEY = re.compile(rf"(?<![\w/.])(?:actor\.|critic\.)?((?:{BLOCKS})\.[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?![\w*])")
JOBS = {"actor": "gpt_ppo_actor", "critic": "gpt_ppo_critic", "reward": "inference_rm", "writer": "generate"}
# Names of the user's follow there.
OWN = ("trainer.ppo.rewards.", "model.data.data_prefix.")
# What the page is to have whole, by job.
WHOLE = [
    ("actor", "trainer.ppo"),
    ("actor", "model.ppo"),
    ("actor", "remote_critic_rm"),
    ("critic", "trainer.ppo"),
]


def settings(config_name: str) -> dict[str, Any]:
    """Every key of a script's configuration, as written: interpolations stay. Blocks have None."""
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(compose(config_name), resolve=False)
    found: dict[str, Any] = {}

    def walk(node: object, prefix: str) -> None:
        if isinstance(node, dict):
            for name, value in node.items():
                found[f"{prefix}{name}"] = None if value and isinstance(value, dict) else value
                walk(value, f"{prefix}{name}.")

    walk(config, "")
    return found


@pytest.fixture(scope="module")
def known() -> dict[str, dict[str, Any]]:
    return {job: settings(name) for job, name in JOBS.items()}


def tables() -> list[tuple[str, str, str]]:
    """(job, key, default) of each row under #ppo-hyperparameters."""
    found, job = [], ""
    for line in PAGE.partition("\n## PPO hyperparameters\n")[2].splitlines():
        if header := re.match(r"\| key of the (\w+) \|", line):
            job = header[1]
        elif line.startswith("| `"):
            key, default, _ = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:4])
            found.append((job, key.strip("`"), default.replace("\\|", "|")))
    return found


def without_effect(config_name: str) -> tuple[str, ...]:
    """Keys, and blocks, whose comments say that they change nothing."""
    text = (CONF / f"{config_name}.yaml").read_text()
    lines = text.splitlines()
    silent = re.compile(r" # (no effect|only |TensorRT-LLM)")
    return tuple(key for key, index in keys(yaml.compose(text)) if silent.search(lines[index]))


def is_file(word: str) -> bool:
    return word.endswith((".md", ".nemo", ".py"))


@pytest.fixture(scope="module")
def every_key() -> set[str]:
    """The keys of all scripts, of a model_config.yaml, and those without an effect."""
    scripts = {key for path in CONF.glob("*.yaml") for key in settings(path.stem)}
    return scripts | {f"model.{field.name}" for field in fields(GPTConfig)} | ACCEPTED


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_key_that_is_named_exists(page: Path, every_key: set[str]):
    named = {key for key in KEY.findall(page.read_text()) if not key.startswith(OWN) and not is_file(key)}
    assert sorted(named - every_key) == []


def test_the_guide_names_many_keys():
    assert len(set(KEY.findall(PAGE))) > 60


@pytest.mark.parametrize(("job", "key", "default"), tables(), ids=[f"{j}-{k}" for j, k, _ in tables()])
def test_defaults_are_those_of_the_yaml(known: dict[str, dict[str, Any]], job: str, key: str, default: str):
    value = known[job][key]
    if isinstance(value, str) and value.startswith("${"):
        assert re.fullmatch(rf"as `[\w.]*{re.escape(value.strip('${}').rpartition('.')[2])}`", default)
    else:
        # OmegaConf's YAML, to which 9e-6 is a number.
        assert OmegaConf.to_container(OmegaConf.create(f"told: {default.strip('`')}")) == {"told": value}


@pytest.mark.parametrize(("job", "block"), WHOLE, ids=[f"{job}-{block}" for job, block in WHOLE])
def test_every_setting_of_ppo_has_a_row(known: dict[str, dict[str, Any]], job: str, block: str):
    rows = {key for of, key, _ in tables() if of == job}
    idle, blocks = without_effect(JOBS[job]), {key.rpartition(".")[0] for key in known[job]}
    wanted = [
        key
        for key in known[job]
        if key.startswith(f"{block}.")
        and key not in blocks
        and not f"{key}.".startswith(tuple(f"{k}." for k in idle))
    ]
    assert len(wanted) > 8
    assert [key for key in wanted if key not in rows] == []
