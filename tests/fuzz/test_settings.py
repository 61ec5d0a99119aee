# SPDX-License-Identifier: Apache-2.0
"""Settings, damaged: as typed on a command line, and as a configuration holds them. Each is taken, or refused."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_aligner.config.generate import GenerateJob
from nemo_aligner.config.ppo import ActorJob
from nemo_aligner.config.reward import RMJob
from nemo_aligner.config.serve import CriticJob, RewardServerJob
from nemo_aligner.config.sft import SFTJob
from nemo_aligner.errors import UserError
from nemo_aligner.launch.typed import as_hydra_reads
from nemo_aligner.settings import log_no_effect, parse
from tests.fuzz.guard import run
from tests.fuzz.mutate import RAW, bend, spell, twist

CONF = Path(__file__).parents[2] / "examples/nlp/gpt/conf"
PAIRS = "model.data.data_prefix={train: [a], validation: [b]}"
WEIGHED = "model.data.data_prefix={train: [0.3, a, 0.7, b], validation: c}"
FROM = "pretrained_checkpoint.restore_from_path=a"
SFT_FILES = ("model.data.train_ds.file_path=a", "model.data.validation_ds.file_path=b")
SCRIPTS: dict[str, tuple[type[Any], tuple[str, ...]]] = {
    "gpt_sft": (SFTJob, ("model.restore_from_path=a.nemo", *SFT_FILES)),
    "training_rm": (RMJob, (FROM, PAIRS)),
    "gpt_ppo_actor": (ActorJob, (FROM, WEIGHED)),
    "gpt_ppo_critic": (CriticJob, (FROM,)),
    "inference_rm": (RewardServerJob, ("rm_model_file=a",)),
    "generate": (GenerateJob, ("model.restore_from_path=a",)),
}


SIZES = {"values": 220, "words": 80}


@pytest.fixture(scope="module")
def composed() -> dict[str, dict[str, Any]]:
    """Each script's settings as plain values."""
    return {
        name: OmegaConf.to_container(_compose(name, kind, words), throw_on_missing=False)  # type: ignore[misc]
        for name, (kind, words) in SCRIPTS.items()
    }


def _compose(name: str, kind: type, words: tuple[str, ...]) -> DictConfig:
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra.compose(name, as_hydra_reads(words, kind))
    except (HydraException, OmegaConfBaseException) as error:  # which a script tells in one line
        raise UserError(str(error), fix="-") from error


def _use(config: DictConfig, kind: type) -> None:
    job = parse(config, kind)
    job.check(None)
    log_no_effect(config, kind)


def _values(composed: dict[str, dict[str, Any]]) -> Callable[[random.Random, Path], Callable[[], object]]:
    def make(draw: random.Random, _: Path) -> Callable[[], object]:
        name = draw.choice(list(SCRIPTS))
        value = composed[name]
        for _ in range(draw.choice((1, 1, 3))):
            value = twist(draw, value) if "@@raw" not in json.dumps(value) else value
        try:
            loaded = yaml.load(spell(draw, value), yaml.SafeLoader)
            config = OmegaConf.create(loaded) if isinstance(loaded, dict) else OmegaConf.create({})
        except (yaml.YAMLError, OmegaConfBaseException, RecursionError, ValueError, TypeError):
            config = OmegaConf.create({})  # Hydra's to refuse
        return lambda: _use(config, SCRIPTS[name][0])

    return make


def _words(composed: dict[str, dict[str, Any]]) -> Callable[[random.Random, Path], Callable[[], object]]:
    def make(draw: random.Random, _: Path) -> Callable[[], object]:
        name = draw.choice(list(SCRIPTS))
        kind, words = SCRIPTS[name]
        key = draw.choice(_keys(composed[name]))
        value = draw.choice(
            (*RAW, "1e-3", "0,5", "a b", "it's", "~/x", "${x}", "${oc.env:HOME}", "é", "None", "1_000")
        )
        word = f"{draw.choice(('', '', '+', '++', '~'))}{key}={value}"
        if draw.random() < 0.2:
            word = bend(draw, word.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogateescape")
        return lambda: _use(_compose(name, kind, (*words, word)), kind)

    return make


def _keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    return [
        found
        for name, value in values.items()
        for found in (
            f"{prefix}{name}",
            *(_keys(value, f"{prefix}{name}.") if isinstance(value, dict) else ()),
        )
    ]


def _check(composed: dict[str, dict[str, Any]], name: str, seeds: range) -> None:
    make = {"values": _values, "words": _words}[name](composed)
    ends = run(make, [f"{name} {seed}" for seed in seeds])
    assert ends["refused"] > 0.1 * len(seeds)


@pytest.mark.parametrize("name", ["values", "words"])
def test_settings(composed: dict[str, dict[str, Any]], name: str):
    _check(composed, name, range(SIZES[name]))


@pytest.mark.fuzz
@pytest.mark.parametrize("part", range(1, 10))
@pytest.mark.parametrize("name", ["values", "words"])
def test_many_settings(composed: dict[str, dict[str, Any]], name: str, part: int):
    _check(composed, name, range(SIZES[name] * part, SIZES[name] * (part + 1)))
