# SPDX-License-Identifier: Apache-2.0
"""A training step on both sides: ours timed as the peers time theirs, sides in turn, and their figures."""

import argparse
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from benchmarks import matmul
from benchmarks.figures import Figure, ratio
from benchmarks.processes import ALLOCATORS, THREADS, Measured, Side, run_side
from nemo_aligner.batch import TokenBatch
from nemo_aligner.models.gpt.learner import GPTLearner
from nemo_aligner.objectives.protocol import Objective

__all__ = [
    "REPEATS",
    "SPEED",
    "Found",
    "alternated",
    "limited",
    "print_result",
    "ratios",
    "sides_figures",
    "timed",
]

REPEATS = 3
SPEED = "tokens/s"
COMPARED = (SPEED, "peak RSS in GiB", "CPU seconds per step")

Found = Mapping[tuple[str, str], Sequence[Measured]]  # of a side's name and an allocator's: one per repeat
_ByName = Mapping[tuple[str, str, str], Figure]  # of the side, the allocator and the metric


def print_result(description: str | None, train: Callable[[], str]) -> None:
    """A side alone, which takes no arguments: print its RESULT line.

    Args:
        description: of the module that is run.
        train: gives the line.
    """
    argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    torch.set_num_threads(THREADS)
    print(train())


def timed(
    learner: GPTLearner,
    batches: Iterator[TokenBatch],
    objective: Objective,
    *,
    tokens: int,
    warm_up: int,
    measured: int,
    annotate: Callable[[Sequence[TokenBatch]], Sequence[TokenBatch]] = list,
) -> str:
    """Train as SupervisedTrainer does, and tell of it in the peers' form.

    Args:
        tokens: that are not padding, in each batch.
        warm_up: steps before the clock starts.
        measured: steps after them.
        annotate: puts on batches what the loss needs from another model.
    """

    def steps(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            batch = next(batches)
            assert int(batch.lengths.sum()) == tokens
            learner.get_loss_and_metrics(annotate([batch]), objective, forward_only=False)
            learner.optimizer_step()
        return time.perf_counter() - started

    steps(warm_up)
    before = resource.getrusage(resource.RUSAGE_SELF)
    seconds = steps(measured)
    after = resource.getrusage(resource.RUSAGE_SELF)
    user, system, faults = (
        (getattr(after, name) - getattr(before, name)) / measured
        for name in ("ru_utime", "ru_stime", "ru_minflt")
    )
    return (
        f"RESULT nemo_aligner: {tokens * measured / seconds:.1f} tok/s "
        f"| {seconds / measured * 1e3:.1f} ms/step mean "
        f"| cpu/step user {user:.2f}s sys {system:.2f}s minflt {faults:.0f} | {tokens} tok/step "
        f"| peakRSS {after.ru_maxrss / 2**20:.2f} GiB | load {os.getloadavg()[0]:.2f}"
    )


def alternated(part: str, sides: Sequence[Side], *, tokens: int) -> tuple[Found, list[float]]:
    """All sides in turn, with either allocator, several times over, and the matmul peak of each repeat in GFLOP/s."""
    peaks: list[float] = []
    found: dict[tuple[str, str], list[Measured]] = {}
    for repeat in range(REPEATS):
        peaks.append(matmul.peak())
        for allocator in ALLOCATORS:
            for side in sides:
                one = run_side(side, allocator)
                found.setdefault((side.name, allocator), []).append(one)
                print(
                    f"{part}: repeat {repeat + 1} of {REPEATS}, {side.name}, {allocator}: "
                    f"{tokens / one.seconds_per_step:.0f} tokens/s, load {os.getloadavg()[0]:.2f}",
                    flush=True,
                )
    return found, peaks


def sides_figures(
    found: Found, peaks: Sequence[float], *, tokens: int, flops: Mapping[str, int]
) -> dict[tuple[str, str, str], Figure]:
    """By side, allocator and metric, the machine's first.

    Args:
        tokens: of a step.
        flops: of a step of each side.
    """
    machine = Figure(table="The machine", subject="fp32 matmul", metric="GFLOP/s", values=tuple(peaks))
    by_name = {("fp32 matmul", "", machine.metric): machine}
    for (side, allocator), measured in found.items():
        values = {
            SPEED: [tokens / one.seconds_per_step for one in measured],
            "peak RSS in GiB": [one.peak_gib for one in measured],
            "CPU seconds per step": [one.cpu_seconds_per_step for one in measured],
            "page faults per step": [one.page_faults_per_step for one in measured],
            "share of the matmul peak": [
                flops[side] / one.seconds_per_step / peak / 1e9
                for one, peak in zip(measured, peaks, strict=True)
            ],
        }
        for metric, each in values.items():
            by_name[side, allocator, metric] = Figure(
                table=allocator.capitalize(), subject=side, metric=metric, values=tuple(each)
            )
    return by_name


def ratios(by_name: _ByName, ours: str, theirs: str, allocator: str) -> list[Figure]:
    """Of what :func:`sides_figures` found, ours over theirs."""
    name = f"{ours} / {theirs}, {allocator}"
    return [
        ratio("Ratios", name, by_name[ours, allocator, metric], by_name[theirs, allocator, metric])
        for metric in COMPARED
    ]


def limited(by_name: _ByName, ours: str, theirs: str, floors: Mapping[str, float]) -> list[Figure]:
    """The ratios with every allocator, that of speeds with what it is to reach where ``floors`` has the allocator."""
    found: list[Figure] = []
    for allocator in ALLOCATORS:
        for one in ratios(by_name, ours, theirs, allocator):
            found.append(one)
            if allocator in floors and one.metric == f"ratio of {SPEED}":
                found.append(replace(one, metric="at least", values=(floors[allocator],)))
    return found
