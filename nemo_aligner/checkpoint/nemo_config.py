# SPDX-License-Identifier: Apache-2.0
"""The text of a model_config.yaml as plain containers. Knows YAML; knows no key."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_aligner.errors import UserError, report_damage

CONFIG_NAME = "model_config.yaml"

_GET_AGAIN = "get the file again from its publisher, or correct it"
_MOST_VALUES = 1_000_000  # of a file, its aliases written out


def parse_config(content: bytes, source: Path) -> dict[str, Any]:
    """The content of a model_config.yaml as plain containers; ``source`` names the archive in messages.

    Raises:
        UserError: it is not YAML, or no mapping.
    """
    with report_damage(f"{source}: {CONFIG_NAME} is not YAML", fix=_GET_AGAIN):
        text = content.decode()
        # Not the C loader: brackets within brackets are frames of its stack, which has no bound but the process's end.
        _check_nodes(yaml.compose(text, Loader=yaml.SafeLoader))
        config = OmegaConf.load(io.StringIO(text))
        if not isinstance(config, DictConfig):
            raise UserError(f"{source}: {CONFIG_NAME} is not a mapping", fix=_GET_AGAIN)
        return _resolve(config)


def block(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A block of a model_config.yaml, empty where it is null or absent; UserError where it is something else."""
    found = config.get(name) or {}
    if not isinstance(found, dict):
        raise UserError(
            f"{CONFIG_NAME}: {name}={str(found)[:60]} is not a block of keys", fix=f"correct {name} there"
        )
    return found


def _check_nodes(root: yaml.Node | None) -> None:
    """Raises ValueError where aliases of aliases stand for more values than memory holds, or a text is none."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 1  # an alias within its own node counts once
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            if isinstance(node, yaml.ScalarNode):
                node.value.encode()  # half of a surrogate pair could be written nowhere
            flat = [part for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,))]
            sizes[id(node)] += sum(map(size, flat))
        return sizes[id(node)]

    if root is not None and size(root) > _MOST_VALUES:
        raise ValueError(f"its aliases stand for more than {_MOST_VALUES} values")


def _resolve(config: DictConfig) -> dict[str, Any]:
    """Plain containers; a value that refers to something outside the file, as NeMo's do, stays as it is."""
    plain: dict[str, Any] = {}
    for key in map(str, config):
        try:
            value = config[key]
            plain[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException:
            raw = OmegaConf.to_container(config, resolve=False)
            assert isinstance(raw, dict)
            plain[key] = raw[key]
    return plain
