# SPDX-License-Identifier: Apache-2.0
"""Settings as YAML, each with its meaning: the comment at its field. What make conf and nemo-aligner config write."""

import ast
import inspect
import io
import json
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from typing import Any

from nemo_aligner.compatibility import NO_EFFECT
from nemo_aligner.models.gpt.config import GPTConfig

REQUIRED = "???"
# What OmegaConf reads as text without quotes: a word, or an interpolation in it.
_PLAIN = re.compile(r"[A-Za-z_$/?][\w./?${}:-]*(?<!:)")
_NOT_TEXT = {"null", "true", "false", "yes", "no", "on", "off", "nan", "inf"}
# Keys of the architecture that are not fields of GPTConfig.
_MEANINGS = {"model.seq_len_interpolation_factor": "stretch rotary positions linearly by this factor"}


@dataclass(frozen=True, kw_only=True)
class Key:
    """A line of a YAML file, and the lines below it."""

    name: str
    value: Any = None
    comment: str
    below: list["Key"] = field(default_factory=list)

    def lines(self, indent: str = "") -> Iterator[str]:
        """As the file has it."""
        value = "" if self.below else f" {as_yaml(self.value)}"
        yield f"{indent}{self.name}:{value}  # {self.comment}"
        for key in self.below:
            yield from key.lines(indent + "  ")

    def values(self, block: str = "") -> Iterator[tuple[str, Any]]:
        """(dotted key, default) of it, or of what is below it."""
        if not self.below:
            yield f"{block}{self.name}", self.value
        for key in self.below:
            yield from key.values(f"{block}{self.name}.")


def as_yaml(value: object) -> str:
    """A default on one line.

    >>> as_yaml([True, None, 9e-07, 1.0, "jsonl", "{input}", {"a": "1"}])
    '[True, null, 9e-7, 1.0, jsonl, "{input}", {a: "1"}]'
    """
    match value:
        case None:
            return "null"
        case str():
            plain = _PLAIN.fullmatch(value) and value.lower() not in _NOT_TEXT
            return value if plain else re.sub(r"(?<!\\)\\u00", r"\\x", json.dumps(value))
        case list() | tuple():
            return f"[{', '.join(map(as_yaml, value))}]"
        case dict():
            return f"{{{', '.join(f'{name}: {as_yaml(one)}' for name, one in value.items())}}}"
    return re.sub(r"e(-?)0(\d)", r"e\1\2", repr(value))


@cache
def comments(kind: type[object]) -> dict[str, str]:
    """{field: its comment}, of the fields that stand in the class itself."""
    source = textwrap.dedent(inspect.getsource(kind))
    lines = source.splitlines()
    found = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    note: dict[str, str] = {}
    for node in tree.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        above, line = [], node.lineno - 1
        while line in found and lines[line - 1].lstrip().startswith("#"):
            above.insert(0, found[line])
            line -= 1
        if text := found.get(node.end_lineno or node.lineno) or " ".join(above):
            note[node.target.id] = text
    return note


def meaning(kind: type[object], name: str) -> str | None:
    """A field's comment, or that of the class it is inherited from."""
    return next(
        (note for base in kind.__mro__ if is_dataclass(base) and (note := comments(base).get(name))), None
    )


def block_of(hint: object) -> type[Any] | None:
    """The dataclass that a field holds, or may hold; one that stands below a name of the user's is none."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind)), None)


def comment(kind: type[object], key: str) -> str:
    """The meaning of a key whose field ``kind`` has, or that stands in its place without effect."""
    note = _note(kind, key)
    assert note, f"nobody says what {key} means: write it in a comment beside the field of {kind.__name__}"
    return note


def _note(kind: type[object], key: str) -> str | None:
    block, _, name = key.rpartition(".")
    if note := meaning(kind, name) or (meaning(GPTConfig, name) if block == "model" else None):
        return note
    return next(
        (f"no effect: {instead}" for other, _, instead in NO_EFFECT if other == key), _MEANINGS.get(key)
    )


def meaning_of(kind: type[Any], key: str) -> str:
    """The meaning of a dotted key in nested dataclasses, or of the field that it stands below."""
    block = kind
    for name in key.split(".")[:-1]:
        inner = block_of(typing.get_type_hints(block)[name])
        if inner is None:
            return meaning(block, name) or ""
        block = inner
    return comment(block, key)


def explain(values: Mapping[str, Any], kind: type[Any]) -> str:
    """Values of a ``kind``, as Hydra composed them, with what they mean; without those that have no effect."""
    return "\n".join(line for key in _explained(values, kind, "") for line in key.lines()) + "\n"


def _explained(values: Mapping[str, Any], kind: type[Any], prefix: str) -> Iterator[Key]:
    hints = typing.get_type_hints(kind)
    for name, value in sorted(values.items(), key=lambda item: isinstance(item[1], dict)):
        note, inner = _note(kind, f"{prefix}{name}") or "", block_of(hints.get(name))
        if inner and isinstance(value, dict) and value:
            yield Key(name=name, comment=note, below=list(_explained(value, inner, f"{prefix}{name}.")))
        elif not note.startswith("no effect"):
            yield Key(name=name, value=value, comment=note)
