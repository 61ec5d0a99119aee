# SPDX-License-Identifier: Apache-2.0
"""Write examples/nlp/gpt/conf, and defaults in docs, from the settings' dataclasses: make conf.

A key, its default and its meaning are a field's: the meaning is the comment beside the field or above it. What no field
has stands in tools/conf_files.py. In docs, the cell behind a key is written; the advice beside it stays.
"""

import ast
import inspect
import io
import json
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from nemo_aligner.compatibility import NO_EFFECT
from nemo_aligner.models.gpt.config import GPTConfig
from tools.conf_files import FILES, HEAD, MEANINGS, TAIL, File

__all__ = ["CONF", "meaning", "written"]

ROOT = Path(__file__).parents[1]
CONF = ROOT / "examples/nlp/gpt/conf"
PAGES = (ROOT / "docs/RLHFTraining.md", ROOT / "docs/ppo_details.md")
JOBS = {"actor": "gpt_ppo_actor", "critic": "gpt_ppo_critic"}
# A row of a table in docs: what comes before the default, key and job in it, the default, what comes after.
_ROW = re.compile(r"(\|(?:[^|`]*\|)* `([\w.]+)`(?: \((critic)\))? \| )(?:as )?`[^`]*`( \|.*)")
REQUIRED = "???"
# What OmegaConf reads as text without quotes: a word, or an interpolation in it.
_PLAIN = re.compile(r"[A-Za-z_$/?][\w./?${}:-]*(?<!:)")
_NOT_TEXT = {"null", "true", "false", "yes", "no", "on", "off", "nan", "inf"}


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
    told: dict[str, str] = {}
    for node in tree.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        above, line = [], node.lineno - 1
        while line in found and lines[line - 1].lstrip().startswith("#"):
            above.insert(0, found[line])
            line -= 1
        if text := found.get(node.end_lineno or node.lineno) or " ".join(above):
            told[node.target.id] = text
    return told


def meaning(kind: type[object], name: str) -> str | None:
    """A field's comment, or that of the class it is inherited from."""
    return next(
        (told for base in kind.__mro__ if is_dataclass(base) and (told := comments(base).get(name))), None
    )


def block_of(hint: object) -> type[Any] | None:
    """The dataclass that a field holds, or may hold; one that stands below a name of the user's is none."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind)), None)


def default_of(spec: Field[Any]) -> Any:  # noqa: ANN401
    """A field's default; ??? where it has none."""
    if spec.default_factory is not MISSING:
        return spec.default_factory()
    return REQUIRED if spec.default is MISSING else spec.default


def keys(file: File, kind: type[Any], prefix: str, made: object, shared: type[Any] | None) -> list[Key]:
    """The keys of a block, plain ones before blocks.

    Args:
        prefix: of the block's keys, as in "trainer.ppo.".
        made: the block's default; None: each field's own.
        shared: the part of the block that a group has; of that, only what differs is written.
    """
    plain: list[Key] = []
    blocks: list[Key] = []
    hints, in_group = typing.get_type_hints(kind), {spec.name for spec in fields(shared)} if shared else set()
    for spec in fields(kind):
        key, inner = f"{prefix}{spec.name}", block_of(hints[spec.name])
        if any(fnmatchcase(key, pattern) for pattern in file.hidden):
            continue
        value = default_of(spec) if made is None else getattr(made, spec.name)
        if inner:
            group = file.groups.get(key)
            part = FILES[group].kind if group else inner if spec.name in in_group else None
            below = keys(file, inner, f"{key}.", None if value == REQUIRED else value, part)
            told = f"the rest of this block stands in {group}.yaml" if group else comment(kind, key)
            blocks += [Key(name=spec.name, comment=told, below=below)] if below else []
        elif key in file.values or spec.name not in in_group or value != default_of(spec):
            plain.append(Key(name=spec.name, value=file.values.get(key, value), comment=comment(kind, key)))
    names = {spec.name for spec in fields(kind)}
    for key, value in file.values.items():
        if key.startswith(prefix) and "." not in (name := key.removeprefix(prefix)) and name not in names:
            plain.append(Key(name=name, value=value, comment=comment(kind, key)))
    return plain + blocks


def comment(kind: type[object], key: str) -> str:
    """What a key of ``kind`` means."""
    block, _, name = key.rpartition(".")
    if told := meaning(kind, name) or (meaning(GPTConfig, name) if block == "model" else None):
        return told
    told = next(
        (f"no effect: {instead}" for other, _, instead in NO_EFFECT if other == key), MEANINGS.get(key)
    )
    assert told, f"nobody says what {key} means: write it in a comment beside the field of {kind.__name__}"
    return told


def top(file: File) -> list[Key]:
    """All keys of a file."""
    found = keys(file, file.kind, f"{file.block}." if file.block else "", None, None)
    return sorted(found, key=lambda key: key.name == "model")  # the longest last


def text(file: File) -> str:
    """What a file holds."""
    lines = [f"# {file.command}"]
    if not file.block:
        groups = (f"  - {group}@{block}" for block, group in file.groups.items())
        lines += [*HEAD, *groups, *TAIL, ""]
    for key in top(file):
        lines += [*([""] if key.below and not file.block else []), *key.lines()]
    return "\n".join(lines) + "\n"


def defaults(job: str) -> dict[str, str]:
    """{dotted key: its default, as a table of docs has it}."""
    file = FILES[JOBS[job]]
    parts = [(f"{block}.", top(FILES[group])) for block, group in file.groups.items()]
    values = {
        key: one for block, part in [*parts, ("", top(file))] for k in part for key, one in k.values(block)
    }
    cells: dict[str, str] = {}
    for key, value in values.items():
        repeated = re.fullmatch(r"\$\{(\.?)([\w.]+)\}", value) if isinstance(value, str) else None
        if repeated:
            block = f"{key.rpartition('.')[0]}." if repeated[1] else ""
            cells[key] = f"as `{block}{repeated[2]}`"
        else:
            cells[key] = f"`{as_yaml(value)}`".replace("|", "\\|")
    return cells


def page(content: str) -> str:
    """A page of docs with the defaults of the keys in its tables that have such a column."""
    known, job, lines = {name: defaults(name) for name in JOBS}, "", []
    for line in content.splitlines():
        if header := re.match(r"\|.* key(?: of the (\w+))? \| default \|", line):
            job = header[1] or "actor"
        elif not line.startswith("|"):
            job = ""
        row = _ROW.fullmatch(line) if job else None
        lines.append(f"{row[1]}{known[row[3] or job][row[2]]}{row[4]}" if row else line)
    return "\n".join(lines) + "\n"


def written() -> dict[Path, str]:
    """{path: what it is to hold}, of pages and each file but _base/hydra.yaml, which has no setting of ours."""
    files = {CONF / f"{name}.yaml": text(file) for name, file in FILES.items()}
    return files | {path: page(path.read_text()) for path in PAGES}


if __name__ == "__main__":
    for path, content in written().items():
        path.write_text(content)
