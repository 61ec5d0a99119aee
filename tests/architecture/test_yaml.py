# SPDX-License-Identifier: Apache-2.0
"""Configuration files are written from the dataclasses: each key has a comment, each file starts with a command."""

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from nemo_aligner.config.explained import as_yaml, meaning
from nemo_aligner.run.schedule import LoopConfig, SupervisedConfig
from tools.conf import page, written

ROOT = Path(__file__).parents[2]
CONF = ROOT / "examples/nlp/gpt/conf"
FILES = sorted(CONF.rglob("*.yaml"))
# Settings of papers, which are not the defaults of any dataclass.
RECIPES = sorted((CONF / "recipe").glob("*.yaml"))
# Hydra's own keys, which are not settings of ours.
HYDRA = {"defaults", "hydra"}


def name(path: Path) -> str:
    return str(path.relative_to(CONF))


def keys(node: yaml.Node, prefix: str = "", *, blocks: bool = True) -> list[tuple[str, int]]:
    """(dotted key, line index) of every key below ``node``, of blocks too; lists of plain values have none."""
    found = []
    match node:
        case yaml.MappingNode():
            for key, value in node.value:
                if prefix or key.value not in HYDRA:
                    dotted = f"{prefix}{key.value}"
                    own = [(dotted, key.start_mark.line)]
                    is_block = isinstance(value, yaml.MappingNode)
                    found += own if blocks or not is_block else []
                    found += keys(value, f"{dotted}.", blocks=blocks)
        case yaml.SequenceNode():
            for item in node.value:
                found += keys(item, prefix, blocks=blocks)
    return found


def uncommented(text: str, *, blocks: bool = True) -> list[str]:
    """Keys with no comment on their own line nor on the line above."""
    lines = ["", *text.splitlines()]
    return [
        key
        for key, index in keys(yaml.compose(text), blocks=blocks)
        if " # " not in lines[index + 1] and not lines[index].lstrip().startswith("#")
    ]


def test_a_key_without_a_comment_is_found():
    text = "a: 1  # what a is\nb: 2\n# what c is\nc:\n  d: 3\ndefaults: [x]\n"
    assert uncommented(text) == ["b", "c.d"]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_key_has_a_comment(path: Path):
    assert uncommented(path.read_text(), blocks=path not in RECIPES) == []


@pytest.mark.parametrize("path", FILES, ids=name)
def test_first_comment_is_a_command_whose_script_exists(path: Path):
    first = next(line for line in path.read_text().splitlines() if not line.startswith("# @package"))
    assert first.startswith("# python examples/")
    assert (ROOT / first.split()[2]).is_file()


def test_files_are_what_the_dataclasses_give():
    """Fix: make conf."""
    told = written()
    assert {path: path.read_text() for path in told} == told
    assert set(FILES) - told.keys() == {CONF / "_base/hydra.yaml", *RECIPES}


def test_a_fields_meaning_is_the_comment_beside_it_or_above_it_or_that_of_its_base():
    assert (
        meaning(SupervisedConfig, "limit_train_batches")
        == "batches of an epoch: a number, or a share up to 1.0"
    )
    assert meaning(LoopConfig, "gradient_clip_val") == meaning(SupervisedConfig, "gradient_clip_val")
    assert meaning(LoopConfig, "gradient_clip_val") == "the gradient's norm is cut to this; 0: never"
    assert meaning(LoopConfig, "nothing") is None


@pytest.mark.parametrize(
    "value", [None, True, 9e-07, 1e16, -100.0, "1", "null", "a: b", "{x} y", "\x11\n", (0.9, 1), {}]
)
def test_a_default_is_read_as_it_was_written(value: object):
    read = OmegaConf.create(f"key: {as_yaml(value)}  # comment").key
    assert read == (list(value) if isinstance(value, tuple) else value)


def test_defaults_in_docs_are_written_and_advice_stays():
    table = """| key of the critic | default | advice |
|---|---|---|
| `trainer.ppo.port` | `1` | Leave `it`. |
| `trainer.ppo.inference_micro_batch_size` | `2` | Rows. |

| | key | default | here |
|---|---|---|---|
| 1 | `model.ppo.end` | unknown | As 2. |
| 2 | `model.loss_clip_val` (critic) | as `x` | As 1. |
| 3 | `model.ppo.num_val_samples` | `1` | |

| `health` | `GET` | no table of defaults |
"""
    assert page(table) == table.replace("`1` | Leave", "`5556` | Leave").replace(
        "`2` | Rows", "as `model.forward_micro_batch_size` | Rows"
    ).replace("as `x`", "`0.2`").replace("`1` | |", "as `model.ppo.num_rollout_samples` | |")
