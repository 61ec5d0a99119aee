# SPDX-License-Identifier: Apache-2.0
"""An experiment: commands of nemo-aligner, what is read from their metrics, and what each seed found. Runs nothing."""

import json
import re
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Curve = list[tuple[float, float]]  # of one metric: (step, value)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command of ``nemo-aligner``; each seed has a folder for it, and a finished one is not run again.

    In it DATA stands for the folder of the rows, REAL for that of the real data, SEED and SMOLLM2, and the name of an
    earlier job in capitals for its result.
    """

    name: str
    command: str

    def words(self, names: Mapping[str, str]) -> list[str]:
        """The command's words with the names filled in.

        >>> Job(name="a", command="sft model=DATA/base 'data=x y'").words({"DATA": "/d"})
        ['sft', 'model=/d/base', 'data=x y']
        """
        pattern = re.compile(rf"\b({'|'.join(names)})\b")
        return [pattern.sub(lambda found: names[found[0]], word) for word in shlex.split(self.command)]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A number that is known before anything was learned."""

    name: str
    job: str
    metric: str  # of the job's first step
    value: float
    within: float


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What ``make results ONLY=name`` runs and docs/results.md shows."""

    title: str
    about: str  # model, data and what was learned; Markdown
    write_data: Callable[[Path, int], None]  # into a folder, for a seed
    jobs: tuple[Job, ...]  # the last is the one that is measured
    figures: Mapping[str, str]  # a metric of the last job: what it is. The first is drawn
    gates: tuple[Gate, ...] = ()
    seeds: int = 5
    beside: tuple[str, ...] = ()  # experiments whose curves are drawn in the same picture


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one seed found."""

    curves: Mapping[str, Curve]  # by metric
    gates: Mapping[str, float]
    seconds: float  # that all of its jobs took
    processor: str


@dataclass(frozen=True)
class Spread:
    """Of one number over the seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.mean(self.values)

    @property
    def deviation(self) -> float | None:
        """The sample's standard deviation; None for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        """Mean and standard deviation.

        >>> str(Spread((0.5, 0.7))), str(Spread((2.0,)))
        ('0.600 ± 0.141', '2.000')
        """
        return f"{self.mean:.3f}" + ("" if self.deviation is None else f" ± {self.deviation:.3f}")


def read_curve(lines: Sequence[Mapping[str, float]], metric: str) -> Curve:
    """The metric in the lines of a metrics.jsonl; of a step that was run again the last line counts.

    >>> read_curve([{"step": 1, "loss": 2.0}, {"step": 2}, {"step": 1, "loss": 3.0}], "loss")
    [(1, 3.0)]
    """
    return sorted({line["step"]: round(line[metric], 6) for line in lines if metric in line}.items())


def load(path: Path) -> dict[int, Found]:
    """By seed, what is in the JSON at ``path``; nothing where there is no file."""
    if not path.exists():
        return {}
    return {int(seed): _found(found) for seed, found in json.loads(path.read_text()).items()}


def _found(found: dict[str, Any]) -> Found:
    curves = {name: [(x, y) for x, y in points] for name, points in found["curves"].items()}
    return Found(**{**found, "curves": curves})


def store(path: Path, seed: int, found: Found) -> None:
    """Put what a seed found into the JSON at ``path``, beside the other seeds."""
    whole = {**load(path), seed: found}
    text = json.dumps({str(key): asdict(whole[key]) for key in sorted(whole)}, separators=(",", ":"))
    path.parent.mkdir(exist_ok=True)
    path.write_text(text.replace('},"', '},\n"') + "\n")
