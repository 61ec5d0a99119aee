# SPDX-License-Identifier: Apache-2.0
"""Configuration files explain themselves: each key has a comment, each file starts with a command."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONF = ROOT / "examples/nlp/gpt/conf"
FILES = sorted(CONF.rglob("*.yaml"))
# Hydra's own keys, which are not settings of ours.
HYDRA = {"defaults", "hydra"}


def name(path: Path) -> str:
    return str(path.relative_to(CONF))


def keys(node: yaml.Node, prefix: str = "") -> list[tuple[str, int]]:
    """(dotted key, line index) of every key below ``node``; lists of plain values have none."""
    found = []
    match node:
        case yaml.MappingNode():
            for key, value in node.value:
                if prefix or key.value not in HYDRA:
                    dotted = f"{prefix}{key.value}"
                    found += [(dotted, key.start_mark.line), *keys(value, f"{dotted}.")]
        case yaml.SequenceNode():
            for item in node.value:
                found += keys(item, prefix)
    return found


def uncommented(text: str) -> list[str]:
    """Keys with no comment on their own line nor on the line above."""
    lines = ["", *text.splitlines()]
    return [
        key
        for key, index in keys(yaml.compose(text))
        if " # " not in lines[index + 1] and not lines[index].lstrip().startswith("#")
    ]


def test_a_key_without_a_comment_is_found():
    text = "a: 1  # what a is\nb: 2\n# what c is\nc:\n  d: 3\ndefaults: [x]\n"
    assert uncommented(text) == ["b", "c.d"]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_key_has_a_comment(path: Path):
    assert uncommented(path.read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=name)
def test_first_comment_is_a_command_whose_script_exists(path: Path):
    first = next(line for line in path.read_text().splitlines() if not line.startswith("# @package"))
    assert first.startswith("# python examples/")
    assert (ROOT / first.split()[2]).is_file()
