# SPDX-License-Identifier: Apache-2.0
"""Write examples/nlp/gpt/conf, and defaults in docs, from the settings' dataclasses: make conf.

A key, its default and its meaning are a field's: the meaning is the comment beside the field or above it. What no field
has stands in tools/conf_files.py. In docs, the cell behind a key is written; the advice beside it stays.
"""

import re
import typing
from dataclasses import MISSING, Field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from nemo_aligner.config.explained import REQUIRED, Key, as_yaml, block_of, comment
from nemo_aligner.config.short_names import COMMAND_DEFAULTS, SHORT_NAMES
from tools.conf_files import FILES, HEAD, TAIL, File

__all__ = ["CONF", "written"]

ROOT = Path(__file__).parents[1]
CONF = ROOT / "examples/nlp/gpt/conf"
PAGES = tuple(ROOT / "docs" / name for name in ("RLHFTraining.md", "ppo_details.md", "grpo.md"))
COMMAND_PAGE = ROOT / "docs/command.md"
# By what a table's header calls them; the actor where it says nothing.
JOBS = {"actor": "gpt_ppo_actor", "critic": "gpt_ppo_critic", "GRPO": "gpt_grpo"}
# A row of a table in docs: what comes before the default, key and job in it, the default, what comes after.
_ROW = re.compile(r"(\|(?:[^|`]*\|)* `([\w.]+)`(?: \((critic)\))? \| )(?:as )?`[^`]*`( \|.*)")


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
        if inner and value is not None:
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


def top(file: File) -> list[Key]:
    """All keys of a file."""
    found = keys(file, file.kind, f"{file.block}." if file.block else "", None, None)
    return sorted(found, key=lambda key: key.name == "model")  # the longest last


def text(file: File) -> str:
    """The content of a file."""
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
        if header := re.match(r"\|.* key(?: of (?:the )?(\w+))? \| default \|", line):
            job = header[1] or "actor"
        elif not line.startswith("|"):
            job = ""
        row = _ROW.fullmatch(line) if job else None
        lines.append(f"{row[1]}{known[row[3] or job][row[2]]}{row[4]}" if row else line)
    return "\n".join(lines) + "\n"


def command_page(content: str) -> str:
    """docs/command.md with its two tables."""
    lines = ["", "| short name | stands for |", "|---|---|"]
    lines += [
        f"| `{name}` | {' or '.join(f'`{key}`' for key in keys)} |" for name, keys in SHORT_NAMES.items()
    ]
    content = _between(content, "short names", lines)
    lines = ["", "| key | the command's default |", "|---|---|"]
    lines += [f"| `{key}` | `{value}` |" for key, value in COMMAND_DEFAULTS.items()]
    return _between(content, "defaults", lines)


def _between(content: str, name: str, lines: list[str]) -> str:
    start = f"<!-- {name}: written by make conf -->\n"
    before, _, rest = content.partition(start)
    return f"{before}{start}{chr(10).join(lines)}\n\n{rest[rest.index('<!-- end -->') :]}"


def written() -> dict[Path, str]:
    """{path: what it is to hold}, of pages and each file but _base/hydra.yaml, which has no setting of ours."""
    files = {CONF / f"{name}.yaml": text(file) for name, file in FILES.items()}
    files[COMMAND_PAGE] = command_page(COMMAND_PAGE.read_text())
    return files | {path: page(path.read_text()) for path in PAGES}


if __name__ == "__main__":
    for path, content in written().items():
        path.write_text(content)
