# SPDX-License-Identifier: Apache-2.0
"""From what a person writes, short names and a file of settings, to words of full keys. Knows no script."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_aligner.config.resume import flat
from nemo_aligner.config.short_names import command_defaults, short_names
from nemo_aligner.errors import UserError, located, report_damage
from nemo_aligner.launch.typed import quoted
from nemo_aligner.settings import is_field, refuse_unknown

_SHORT = re.compile(r"(?P<sign>\+{0,2})(?P<name>[A-Za-z_]\w*)=(?P<value>.*)", re.DOTALL)
_OPTION = "--config"
# What stays as it is below a setting without a type: lists, numbers, null, and what is quoted already.
_TYPED = re.compile(r"\[.*|'.*'|\".*\"|null|[+-]?(\d+\.?\d*|\.\d+)", re.DOTALL)


def full_words(words: Sequence[str], kind: type[object]) -> list[str]:
    """The command's defaults, the settings of the files that ``--config`` names, and the words: the last one counts.

    Raises:
        UserError: a file cannot be read or has unknown keys, or a short name is mistyped.
    """
    names, (files, settings) = short_names(kind), split_words(words)
    given = [word for path in files for word in _words_of(path, kind)]
    typed = [_full(word, names, kind) for word in settings]
    return [*(f"{key}={value}" for key, value in command_defaults(kind).items()), *given, *typed]


def split_words(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """(The files that ``--config`` names, the other words)."""
    files, others, rest = list[Path](), list[str](), iter(words)
    for word in rest:
        if word == _OPTION:
            files.append(Path(next(rest, "")))
        elif word.startswith(f"{_OPTION}="):
            files.append(Path(word.removeprefix(f"{_OPTION}=")))
        else:
            others.append(word)
    return files, others


def read_settings(path: Path, *, form: str) -> DictConfig:
    """The settings in a YAML file, interpolations as they are; ``form`` is what shows people how they are written.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    if not path.is_file():
        raise UserError(f"{_OPTION} {path}: there is no such file", fix="name a YAML file of settings")
    with report_damage(f"{path} is not YAML", fix=f"correct it; {form} shows the form"):
        config = OmegaConf.load(path)
    if not isinstance(config, DictConfig):
        raise UserError(f"{path} is a list", fix="write KEY: VALUE, blocks indented")
    return config


def _full(word: str, names: Mapping[str, str], kind: type[object]) -> str:
    found = _SHORT.fullmatch(word)
    if found is None:
        return word
    name, value = found["name"], found["value"]
    if name not in names:
        if not is_field(kind, name) and (near := difflib.get_close_matches(name, names, n=1)):
            raise UserError(f"{word}: there is no setting {name}", fix=f"did you mean {near[0]}={value}?")
        return word
    key = names[name]
    if not is_field(kind, key) and ".data_prefix." in key and not _TYPED.fullmatch(value):
        value = quoted(value)
    return f"{found['sign']}{key}={value}"


def _words_of(path: Path, kind: type[object]) -> list[str]:
    values: Any = OmegaConf.to_container(read_settings(path, form="nemo-aligner config COMMAND"))
    with located(lambda: f"{path}: "):
        refuse_unknown(values, kind)
    return [f"{key}={in_hydras_grammar(value)}" for key, value in flat(values).items()]


def in_hydras_grammar(value: object) -> str:
    """A value as Hydra reads it behind KEY=."""
    match value:
        case None:
            return "null"
        case str():
            return quoted(value)
        case list():
            return f"[{','.join(map(in_hydras_grammar, value))}]"
        case dict():
            return f"{{{','.join(f'{key}:{in_hydras_grammar(one)}' for key, one in value.items())}}}"
    return str(value)
