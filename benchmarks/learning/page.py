# SPDX-License-Identifier: Apache-2.0
"""docs/results.md and its pictures, out of what the seeds have found."""

import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.learning.experiment import Curve, Experiment, Found, Job, Spread, load
from benchmarks.learning.recipes import EXPERIMENTS
from benchmarks.processes import ROOT

PAGE = ROOT / "docs/results.md"
PICTURES = ROOT / "docs/images/learning"
COLUMNS = 108  # of a command
INTRODUCTION = """\
`make results` writes this page from [benchmarks/learning](/benchmarks/learning), which holds the curve of every seed. A
figure is the mean ± the standard deviation over the seeds. A seed draws the order of the data, new weights and the
responses. Hours are those of all commands of a seed, on the processor that is named, with other work beside them.

In the commands DATA is the folder of the rows, which [data.py](/benchmarks/learning/data.py) writes, SMOLLM2 the GGUF
file of SmolLM2-135M-Instruct that `make model` fetches, and REAL the folder that `NEMO_ALIGNER_TEST_DATA` names, with
parts of public data sets: Dolly (CC BY-SA 3.0), HH-RLHF (MIT), TinyStories (CDLA-Sharing-1.0), Prometheus' scores
(Apache 2.0) and the model stories260K (MIT). Other names in capitals are results of commands before.
"""


def found_in(name: str) -> Path:
    """Where the seeds of an experiment are."""
    return Path(__file__).parent / f"found/{name}.json"


def write() -> None:
    """Write the page, and a picture for each experiment."""
    found = {name: load(found_in(name)) for name in EXPERIMENTS}
    PAGE.write_text(text(found))
    for name, experiment in EXPERIMENTS.items():
        if found[name]:
            _draw(name, experiment, found)


def text(found: Mapping[str, Mapping[int, Found]]) -> str:
    """The page in Markdown: a table of all experiments, then a section for each."""
    there = {name: experiment for name, experiment in EXPERIMENTS.items() if found[name]}
    lines = ["# Results", "", INTRODUCTION.rstrip(), ""]
    lines += ["| experiment | figure | at first | at the end | lowest to highest | seeds | hours |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|"]
    for name, experiment in there.items():
        lines += _rows(name, experiment, found[name])
    for name, experiment in there.items():
        lines += ["", *_section(name, experiment, found[name])]
    return "\n".join(lines) + "\n"


def _rows(name: str, experiment: Experiment, seeds: Mapping[int, Found]) -> Iterator[str]:
    hours = Spread(tuple(one.seconds / 3600 for one in seeds.values()))
    for metric, meaning in experiment.figures.items():
        curves = _at_common_steps([one.curves[metric] for one in seeds.values()])
        first, last = (Spread(tuple(curve[at][1] for curve in curves)) for at in (0, -1))
        at_first = f"{first} (step {curves[0][0][0]:.0f})"
        at_end = f"{last} (step {curves[0][-1][0]:.0f})"
        extremes = f"{min(last.values):.3f} to {max(last.values):.3f}"
        yield (
            f"| [{name}](#{_anchor(experiment.title)}) | {meaning} | {at_first} | {at_end} | {extremes} "
            f"| {len(seeds)} | {hours.mean:.2f} |"
        )


def _anchor(title: str) -> str:
    """The heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def _section(name: str, experiment: Experiment, seeds: Mapping[int, Found]) -> Iterator[str]:
    yield from (f"## {experiment.title}", "", experiment.about, "")
    yield f"`make results ONLY={name} AGAIN=1` measures this again:"
    yield from ("", "```bash", *(_command(job) for job in experiment.jobs), "```", "")
    yield from (f"![{experiment.title} over steps](images/learning/{name}.svg)", "")
    if experiment.gates:
        yield from ("| before anything is learned | known | found |", "|---|---:|---:|")
        for gate in experiment.gates:
            values = [one.gates[gate.name] for one in seeds.values()]
            yield f"| {gate.name} | {gate.value:.6f} | {min(values):.6f} to {max(values):.6f} |"
        yield ""
    yield f"Processor: {'; '.join(dict.fromkeys(one.processor for one in seeds.values()))}."


def _command(job: Job) -> str:
    """The command over several lines, as it can be pasted once its names in capitals are filled in."""
    return textwrap.fill(
        f"nemo-aligner {job.command} out={job.name.upper()}",
        COLUMNS,
        subsequent_indent="   ",
        break_long_words=False,
        break_on_hyphens=False,
    ).replace("\n", " \\\n")


def _draw(name: str, experiment: Experiment, found: Mapping[str, Mapping[int, Found]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    # The same numbers give the same file, and letters stay letters.
    matplotlib.rcParams |= {"svg.hashsalt": name, "svg.fonttype": "none"}
    from matplotlib import pyplot

    metric, meaning = next(iter(experiment.figures.items()))
    figure, panel = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for other in (name, *experiment.beside):
        if not found[other]:
            continue
        curves = _at_common_steps([one.curves[metric] for one in found[other].values()])
        steps, means, low, high = _band(curves)
        label = (
            f"{EXPERIMENTS[other].title}, {len(curves)} seeds"
            if len(curves) > 1
            else EXPERIMENTS[other].title
        )
        (line,) = panel.plot(steps, means, "o-", markersize=3, label=label)
        panel.fill_between(steps, low, high, color=line.get_color(), alpha=0.2)
    panel.set(xlabel="step", ylabel=meaning)
    panel.grid(alpha=0.3)
    panel.legend()
    PICTURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})
    pyplot.close(figure)


def _at_common_steps(curves: list[Curve]) -> list[Curve]:
    """The curves at steps that all have; where a recipe has changed, some seeds are of the earlier one.

    >>> _at_common_steps([[(0, 1.0), (5, 2.0)], [(5, 3.0)]])
    [[(5, 2.0)], [(5, 3.0)]]
    """
    steps = set.intersection(*({step for step, _ in curve} for curve in curves))
    return [[point for point in curve if point[0] in steps] for curve in curves]


def _band(curves: list[Curve]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Steps, and the mean, the least and the largest value of each over the seeds."""
    steps = [step for step, _ in curves[0]]
    columns = list(zip(*([value for _, value in curve] for curve in curves), strict=True))
    means = [sum(column) / len(column) for column in columns]
    return steps, means, [min(column) for column in columns], [max(column) for column in columns]
