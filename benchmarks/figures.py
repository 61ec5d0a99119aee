# SPDX-License-Identifier: Apache-2.0
"""What a benchmark found: figures by name, as lines, as JSON and as a page. Measures nothing itself."""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Figure", "Part", "checked", "load", "page", "ratio", "store"]

INTRODUCTION = """\
`make bench` writes this page from [results.json](/benchmarks/results.json), which holds every repeat. A cell is the
median over the repeats, with the smallest and the largest in parentheses. Absolute figures belong to one machine
and to what its neighbours did in that hour; ratios are of runs that followed each other.
"""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One named number, with its value in every repeat."""

    table: str  # the heading it stands under
    subject: str  # whose number: a row of the table
    metric: str  # what was measured, with its unit: a column of the table
    values: tuple[float, ...]  # one per repeat

    @property
    def median(self) -> float:
        """Over the repeats."""
        return statistics.median(self.values)

    def line(self) -> str:
        """The figure on a line of its own: median (smallest to largest repeat).

        >>> Figure(table="Ratios", subject="ours / plain", metric="ratio of tokens/s", values=(1.9, 2.0, 1.8)).line()
        'Ratios: ours / plain: ratio of tokens/s 1.90 (1.80 to 2.00)'
        """
        return f"{self.table}: {self.subject}: {self.metric} {self.cell()}"

    def cell(self) -> str:
        """Median (smallest to largest repeat)."""
        spread = (
            f" ({number(min(self.values))} to {number(max(self.values))})" if len(self.values) > 1 else ""
        )
        return number(self.median) + spread


@dataclass(frozen=True, kw_only=True)
class Part:
    """All that one part of ``make bench`` found, and what is needed to read it."""

    title: str
    about: str  # what was measured, by which rules; Markdown
    conditions: dict[str, str]  # name: value, such as the processor
    figures: tuple[Figure, ...]


def number(value: float) -> str:
    """Three digits, or all that stand before the point.

    >>> number(2047.6), number(12.34), number(1.234), number(0.1234)
    ('2048', '12.3', '1.23', '0.123')
    """
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def ratio(table: str, name: str, top: Figure, bottom: Figure) -> Figure:
    """``top`` / ``bottom`` of one metric, repeat by repeat: both sides of a repeat ran next to each other."""
    assert top.metric == bottom.metric, (top.metric, bottom.metric)
    values = tuple(a / b for a, b in zip(top.values, bottom.values, strict=True))
    return Figure(table=table, subject=name, metric=f"ratio of {top.metric}", values=values)


def checked(found: Figure, word: str, limit: float, allocator: str) -> list[Figure]:
    """A figure and, with the default allocator, what it is to reach or to stay below."""
    if allocator != "default allocator":
        return [found]
    return [found, Figure(table=found.table, subject=found.subject, metric=word, values=(limit,))]


def store(path: Path, name: str, part: Part) -> dict[str, Part]:
    """Put ``part`` into the JSON at ``path``, beside the others that are there; returns all of them."""
    parts = load(path) | {name: part}
    path.write_text(json.dumps({key: asdict(value) for key, value in sorted(parts.items())}, indent=2) + "\n")
    return parts


def load(path: Path) -> dict[str, Part]:
    """The parts in the JSON at ``path``; none where there is no file."""
    if not path.exists():
        return {}
    return {name: _part(found) for name, found in json.loads(path.read_text()).items()}


def _part(found: dict[str, Any]) -> Part:
    figures = tuple(Figure(**{**figure, "values": tuple(figure["values"])}) for figure in found["figures"])
    return Part(**{**found, "figures": figures})


def page(parts: dict[str, Part], order: Iterable[str]) -> str:
    """The page in Markdown: a section per part in ``order``, a table per heading."""
    lines = ["# Performance", "", INTRODUCTION.rstrip()]
    for name in order:
        if name in parts:
            lines += ["", f"## {parts[name].title}", "", f"`make bench ONLY={name}` measures this again.", ""]
            lines += _section(parts[name])
    return "\n".join(lines) + "\n"


def _section(part: Part) -> list[str]:
    lines = [part.about.rstrip(), "", *(f"- {name}: {value}" for name, value in part.conditions.items())]
    for heading in _in_order(figure.table for figure in part.figures):
        lines += ["", f"### {heading}", "", *_table([f for f in part.figures if f.table == heading])]
    return lines


def _table(figures: Sequence[Figure]) -> list[str]:
    metrics = _in_order(figure.metric for figure in figures)
    cells = {(figure.subject, figure.metric): figure.cell() for figure in figures}
    lines = ["| |" + "".join(f" {metric} |" for metric in metrics), "|---|" + "---:|" * len(metrics)]
    for subject in _in_order(figure.subject for figure in figures):
        lines.append(f"| {subject} |" + "".join(f" {cells.get((subject, m), '')} |" for m in metrics))
    return lines


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
