# SPDX-License-Identifier: Apache-2.0
"""Runs a reader on many inputs in a process of its own: what it raises, how long it takes, what memory it takes."""

import gc
import json
import os
import random
import resource
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from nemo_aligner.errors import UserError

__all__ = ["Made", "run"]

SECONDS = 5  # of CPU for one input
ROOM = 1 << 30  # bytes of address space beyond what the process starts with
GROWTH = 300 << 20  # bytes of memory in use at most beyond that

Made = Callable[[random.Random, Path], Callable[[], object]]  # writes an input; returns what reads it


class _TooSlow(BaseException):
    pass


def run(make: Made, seeds: Iterable[object]) -> dict[str, int]:
    """How many inputs were read and how many refused.

    Raises:
        AssertionError: one raised another error than UserError, took too long or too much, or ended the process.
    """
    with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
        log = Path(folder) / "log.jsonl"
        gc.collect()
        if (child := os.fork()) == 0:
            # What other tests have left, such as groups of ranks, holds threads that this process lacks.
            gc.freeze()
            code = 1
            try:
                _run_all(make, seeds, Path(folder), log)
                code = 0
            except BaseException:  # a child must not go on as a second pytest
                log.open("a").write(json.dumps({"bad": traceback.format_exc()}) + "\n")
            finally:
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        lines = [json.loads(line) for line in log.read_text().split("\n") if line]
    bad = [line["bad"] for line in lines if "bad" in line]
    if status and not bad:
        bad = [f"ended with status {status} in {lines[-1]['seed'] if lines else 'the first input'}"]
    assert not bad, f"{len(bad)} of {len(lines)} inputs, the first:\n" + "\n".join(bad[:5])
    ends = [line["end"] for line in lines if "end" in line]
    return {end: ends.count(end) for end in ("read", "refused")}


def _run_all(make: Made, seeds: Iterable[object], folder: Path, log: Path) -> None:
    def too_slow(*_: object) -> None:
        raise _TooSlow

    signal.signal(signal.SIGPROF, too_slow)
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)  # where no Python code runs that could raise
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    before = _peak()
    with log.open("a") as stream:
        for seed in seeds:
            stream.write(json.dumps({"seed": str(seed)}) + "\n")
            stream.flush()
            with tempfile.TemporaryDirectory(dir=folder) as place:
                outcome = _run_one(make, random.Random(str(seed)), Path(place))
            stream.write(
                json.dumps({"bad": f"{seed}: {outcome}"} if ":" in outcome else {"end": outcome}) + "\n"
            )
            if (grown := _peak() - before) > GROWTH:
                stream.write(json.dumps({"bad": f"{seed}: memory grew by {grown >> 20} MiB"}) + "\n")
                return


def _run_one(make: Made, draw: random.Random, place: Path) -> str:
    try:
        read = make(draw, place)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_VIRTUAL, 3 * SECONDS)
        try:
            read()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    except UserError as error:
        str(error).encode()
        return "refused" if len(str(error)) < 5000 else f"message: {len(str(error))} characters"
    except _TooSlow:
        return f"slow: {traceback.format_exc()[-1500:]}"
    except BaseException:  # what is looked for
        return f"error: {traceback.format_exc()[-1500:]}"
    return "read"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
