# SPDX-License-Identifier: Apache-2.0
"""Each measured side is a process of its own, and all of them say what they found in one form."""

import contextlib
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "ALLOCATORS",
    "PEERS",
    "PEERS_PYTHON",
    "ROOT",
    "THREADS",
    "Job",
    "Measured",
    "Side",
    "conditions",
    "environment",
    "measure",
    "run_side",
    "started",
    "wait_for",
    "wait_for_calm",
]

ROOT = Path(__file__).parents[1]
PEERS = ROOT / "benchmarks/peers"
PEERS_PYTHON = ROOT / ".cache/peers/bin/python"

# glibc hands large freed blocks back to the kernel, and each step then pays for fresh pages; these settings keep them.
ALLOCATORS: dict[str, dict[str, str]] = {
    "default allocator": {},
    "keeping allocator": {
        "MALLOC_MMAP_THRESHOLD_": "17179869184",
        "MALLOC_TRIM_THRESHOLD_": "17179869184",
        "MALLOC_TOP_PAD_": "268435456",
    },
}

THREADS = 2
CALM = 1.0  # load average below which a part starts
PATIENCE_SECONDS = 180
STOP_SECONDS = 30  # for a job to end after SIGTERM

# The line that every side prints, the peers' scripts among them.
_STEP = re.compile(r"RESULT \w+: [\d.]+ tok/s\D*?(?:mean )?([\d.]+) ms")
_CPU = re.compile(r"cpu/step user ([\d.]+)s? sys ([\d.]+)s? minflt (\d+)")
_PEAK = re.compile(r"peakRSS ([\d.]+) GiB")


@dataclass(frozen=True, kw_only=True)
class Side:
    """A script that prints one RESULT line."""

    name: str
    command: tuple[str, ...]  # without the interpreter
    peer: bool  # runs in the peers' environment


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a RESULT line says."""

    seconds_per_step: float
    cpu_seconds_per_step: float  # user and system, all threads
    page_faults_per_step: float
    peak_gib: float  # resident memory, of the whole process

    @classmethod
    def parse(cls, text: str) -> "Measured":
        """From a process's output.

        >>> Measured.parse("RESULT x: 20.0 tok/s | 100.0 ms/step mean, 99 median | cpu/step user 0.15s sys 0.05s "
        ...     "minflt 7 => ... | peakRSS 1.25 GiB").cpu_seconds_per_step
        0.2
        """
        step, cpu, peak = (pattern.search(text) for pattern in (_STEP, _CPU, _PEAK))
        if not (step and cpu and peak):
            raise ValueError(f"no RESULT line in:\n{text}")
        return cls(
            seconds_per_step=float(step[1]) / 1000,
            cpu_seconds_per_step=float(cpu[1]) + float(cpu[2]),
            page_faults_per_step=float(cpu[3]),
            peak_gib=float(peak[1]),
        )


def run_side(side: Side, allocator: str) -> Measured:
    """Run ``side`` with the allocator of that name."""
    return Measured.parse(
        measure(side.command, python=PEERS_PYTHON if side.peer else None, allocator=allocator)
    )


def measure(
    command: Sequence[str], *, python: Path | None = None, allocator: str = "default allocator"
) -> str:
    """Run a script in a process and an empty folder of its own; returns what it printed.

    Args:
        command: the script, or ``-m`` and a module, and its arguments.
        python: its interpreter; None: this one.
        allocator: a name of :data:`ALLOCATORS`.
    """
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [str(python or sys.executable), *command],
            cwd=folder,
            env=environment(folder, allocator, threads=THREADS, ours=python is None),
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with code {done.returncode} (-9: out of memory):\n{done.stderr}")
    return done.stdout


def environment(home: str, allocator: str, *, threads: int, ours: bool) -> dict[str, str]:
    """Of a side's process: as this one's, without what would favour a side; peers do not see our package."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "OMP_", "MKL_", "SLURM"))}
    return (
        env
        | ALLOCATORS[allocator]
        | {
            "OMP_NUM_THREADS": str(threads),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": home,
            "PYTHONPATH": str(ROOT) if ours else "",
        }
    )


@dataclass(frozen=True, kw_only=True)
class Job:
    """A script of ours that runs beside this process and others."""

    name: str
    process: subprocess.Popen[bytes]
    folder: Path  # its working folder, where its output goes

    @property
    def out(self) -> str:
        """What it has printed."""
        return (self.folder / "stdout").read_text()

    def check(self) -> None:
        """End this process, with what the job said, if the job has failed."""
        if self.process.poll():
            words = (self.folder / "stderr").read_text()[-4000:]
            sys.exit(f"{self.name} ended with code {self.process.returncode} (-9: out of memory):\n{words}")


@contextlib.contextmanager
def started(command: Sequence[str], folder: Path, *, allocator: str, threads: int = THREADS) -> Iterator[Job]:
    """Run a script of ours within; what is left of it at the end is stopped.

    Args:
        command: the script, or ``-m`` and a module, and its arguments.
        folder: to be made; its last part is the job's name.
        allocator: a name of :data:`ALLOCATORS`.
        threads: of its computations.
    """
    folder.mkdir()
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=environment(str(folder), allocator, threads=threads, ours=True),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    try:
        yield Job(name=folder.name, process=process, folder=folder)
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(jobs: Sequence[Job], *, seconds: float) -> None:
    """Until all have ended well; else this process ends with what the one that failed has said."""
    until = time.monotonic() + seconds
    while any(job.process.poll() is None for job in jobs):
        for job in jobs:
            job.check()
        if time.monotonic() > until:
            sys.exit(f"{', '.join(job.name for job in jobs)}: not done after {seconds:g} s")
        time.sleep(0.1)
    for job in jobs:
        job.check()


def wait_for_calm() -> float:
    """Wait until the load average is below 1, for three minutes at most; warn where it does not get there."""
    until = time.monotonic() + PATIENCE_SECONDS
    if os.getloadavg()[0] >= CALM:
        print(f"waiting for a load average below {CALM:g}, now {os.getloadavg()[0]:.2f}", flush=True)
    while (load := os.getloadavg()[0]) >= CALM and time.monotonic() < until:
        time.sleep(5)
    if load >= CALM:
        print(f"warning: the load average is {load:.2f}: others are at work here, and figures will be low")
    return load


def conditions() -> dict[str, str]:
    """The machine, for the page."""
    models = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "processor": f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores, {THREADS} threads used",
        "Python": platform.python_version(),
    }
