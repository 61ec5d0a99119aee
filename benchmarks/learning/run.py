# SPDX-License-Identifier: Apache-2.0
"""Run one experiment or all of them, seed by seed, and write docs/results.md and its pictures.

    python -m benchmarks.learning.run [--seeds N] [--again] [experiment ...]

`make results` calls it. What is interrupted goes on: a seed that is known is not run, a finished command of an
unfinished seed neither, and an unfinished command goes on from its last checkpoint, where it saves any. With --again
all begin anew.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.learning import data, page
from benchmarks.learning.experiment import Experiment, Found, Job, load, read_curve, store
from benchmarks.learning.recipes import EXPERIMENTS
from benchmarks.processes import ROOT, conditions

RUNS = ROOT / "results/experiments"


def main() -> None:
    """Run the experiments that are named, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "experiments", nargs="*", metavar="experiment", help=f"{', '.join(EXPERIMENTS)} [all]"
    )
    parser.add_argument("--seeds", type=int, help="at most so many of each experiment")
    parser.add_argument("--again", action="store_true", help="run seeds that are known, too")
    options = parser.parse_args()
    names = options.experiments or list(EXPERIMENTS)
    if unknown := [name for name in names if name not in EXPERIMENTS]:
        parser.error(f"no experiment is named {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    for name in names:
        experiment = EXPERIMENTS[name]
        for seed in range(1, min(experiment.seeds, options.seeds or experiment.seeds) + 1):
            if seed in load(page.found_in(name)) and not options.again:
                print(f"{name}: seed {seed} is known; --again (make results AGAIN=1) runs it", flush=True)
                continue
            if options.again:
                for job in experiment.jobs:
                    shutil.rmtree(RUNS / job.name / str(seed), ignore_errors=True)
            store(page.found_in(name), seed, _run(experiment, seed))
            page.write()
            print(f"{name}: seed {seed} is in {page.PAGE}", flush=True)


def _run(experiment: Experiment, seed: int) -> Found:
    names = {
        "SEED": str(seed),
        "SMOLLM2": str(data.SMOLLM2),
        "REAL": os.environ.get(data.DATA, ""),
        "DATA": str(_data(experiment, seed)),
    }
    seconds = 0.0
    for job in experiment.jobs:
        folder = RUNS / job.name / str(seed)
        seconds += _finish(job, job.words(names), folder)
        names[job.name.upper()] = str(_result(folder))
    lines = _metrics(RUNS / experiment.jobs[-1].name / str(seed))
    gates = {}
    for gate in experiment.gates:
        gates[gate.name] = read_curve(_metrics(RUNS / gate.job / str(seed)), gate.metric)[0][1]
        if abs(gates[gate.name] - gate.value) > gate.within:
            sys.exit(
                f"{gate.name} is {gates[gate.name]}, not {gate.value} within {gate.within}\n"
                f"Fix: find out what {RUNS / gate.job / str(seed)} computes in another way than it should"
            )
    return Found(
        curves={metric: read_curve(lines, metric) for metric in experiment.figures},
        gates=gates,
        seconds=round(seconds, 1),
        processor=conditions()["processor"].rpartition(", ")[0],  # without the threads of timed parts
    )


def _data(experiment: Experiment, seed: int) -> Path:
    """The folder of the rows, written when they are first asked for."""
    folder = RUNS / "data" / experiment.write_data.__name__ / str(seed)
    if not folder.exists():
        unfinished = folder.with_name(f"{seed}.unfinished")
        unfinished.mkdir(parents=True, exist_ok=True)
        experiment.write_data(unfinished, seed)
        unfinished.rename(folder)
    return folder


def _finish(job: Job, words: list[str], folder: Path) -> float:
    """Run the command until it has a result, unless it has one; the seconds of all its runs."""
    clock = folder / "seconds"
    before = float(clock.read_text()) if clock.exists() else 0.0
    if (folder / "done").exists():
        return before
    folder.mkdir(parents=True, exist_ok=True)
    command = ["nemo-aligner", *words, f"out={folder}"]
    print(f"$ {shlex.join(command)}", flush=True)
    started = time.monotonic()
    try:
        with (folder / "log").open("a") as log:
            ended = subprocess.run(
                [sys.executable, "-m", "nemo_aligner", *command[1:]],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                check=False,
            )
    finally:
        clock.write_text(str(before + time.monotonic() - started))
    if ended.returncode:
        sys.exit(f"{job.name} has ended with {ended.returncode}\nFix: read the end of {folder / 'log'}")
    (folder / "done").touch()
    return float(clock.read_text())


def _result(folder: Path) -> Path:
    """The model that a finished command has left."""
    return next((folder / "checkpoints").glob("*.nemo"))


def _metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    main()
