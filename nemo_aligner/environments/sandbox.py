# SPDX-License-Identifier: Apache-2.0
"""Python that nobody trusts, in a process that can read and compute and nothing else. Linux, x86-64 or aarch64.

It has no network, starts no process, writes and makes no file, and has limits of time, memory and output. Root runs it
as another user. What judges its results is never in its process.
"""

import functools
import inspect
import json
import os
import platform
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_aligner.environments import sandbox_child
from nemo_aligner.errors import UserError

NOBODY = 65534  # user and group
_CHUNK = 1 << 16
# Neither this user's packages nor the folder are looked into, and nothing is written.
_FLAGS = ("-s", "-P", "-B")
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a process."""

    seconds: float = 10.0
    memory: int = 1 << 29  # bytes
    output: int = 1 << 20  # bytes that it prints, beyond which it is ended


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The results of a process."""

    values: Sequence[str | None]  # of the expressions that it came to, the repr of each; None: an exception
    output: str  # what it has printed
    problem: str = ""  # why it has not come to its end


def run(source: str, *, expressions: Sequence[str] = (), stdin: str = "", limits: Limits) -> Outcome:
    """Execute ``source`` as the main module, then evaluate expressions in it.

    Raises:
        UserError: this machine has no sandbox.
    """
    user, python = _interpreter()
    allowed = {
        "RLIMIT_AS": limits.memory,
        "RLIMIT_CPU": int(limits.seconds) + 1,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_CORE": 0,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_STACK": 64 << 20,
    }
    job = json.dumps({"source": source, "expressions": list(expressions), "limits": allowed}).encode()
    given = [_in_memory(job), _in_memory(stdin.encode(errors="replace"))]
    ours, theirs = os.pipe()
    try:
        process = subprocess.Popen(
            [python, *_FLAGS, "-c", inspect.getsource(sandbox_child), str(given[0]), str(theirs)],
            user=user,
            group=user,
            extra_groups=None if user is None else [],
            stdin=given[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[given[0], theirs],
            cwd="/",
            env=_ENVIRONMENT,
        )
    finally:
        for descriptor in (*given, theirs):
            os.close(descriptor)
    try:
        return _listen(process, ours, limits)
    finally:
        os.close(ours)
        _kill(process)


def _listen(process: subprocess.Popen[bytes], results: int, limits: Limits) -> Outcome:
    """Read what it writes, until it ends or is beyond its limits."""
    assert process.stdout is not None and process.stderr is not None
    deadline, late = time.monotonic() + limits.seconds, f"it took longer than {limits.seconds:g} s"
    values, output, errors = bytearray(), bytearray(), bytearray()
    places = {results: values, process.stdout.fileno(): output, process.stderr.fileno(): errors}
    problem = ""
    with selectors.DefaultSelector() as selector:
        for descriptor in places:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map() and not problem:
            for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                chunk = os.read(key.fd, _CHUNK)
                places[key.fd] += chunk
                if not chunk:
                    selector.unregister(key.fd)
            if time.monotonic() >= deadline:
                problem = late
            elif sum(map(len, places.values())) > limits.output:
                problem = f"it wrote more than {limits.output} bytes"
    if not problem:
        try:
            problem = _ended(process.wait(max(0.0, deadline - time.monotonic())), errors)
        except subprocess.TimeoutExpired:  # it has closed what it writes to
            problem = late
    if not values and problem != late:
        raise UserError(
            f"the sandbox does not begin: {problem}", fix="run on Linux with seccomp, on x86-64 or aarch64"
        )
    return Outcome(
        values=[_value(line) for line in values.split(b"\n")[1:-1]],
        output=output.decode(errors="replace"),
        problem=problem,
    )


def _ended(code: int, errors: bytearray) -> str:
    """Why a process has ended; empty where it came to its end."""
    if code < 0:
        return f"it ended by {signal.Signals(-code).name}"
    lines = errors.decode(errors="replace").strip().splitlines()
    return "" if code == 0 else next(reversed(lines), f"it ended with {code}")


def _value(line: bytearray) -> str | None:
    """The text in a line, which may be anything."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


@functools.cache
def _interpreter() -> tuple[int | None, str]:
    """As which user to run, None as this one, and by which Python.

    Raises:
        UserError: nothing here can run it.
    """
    if sys.platform != "linux" or platform.machine() not in sandbox_child.ARCHITECTURES:
        raise UserError(
            f"there is no sandbox for {sys.platform} on {platform.machine()}",
            fix="run on Linux, on x86-64 or aarch64",
        )
    if os.geteuid() != 0:
        return None, sys.executable
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            subprocess.run(
                [python, *_FLAGS, "-c", ""],
                user=NOBODY,
                group=NOBODY,
                extra_groups=[],
                check=True,
                cwd="/",
                timeout=60,
                capture_output=True,
            )
        except (OSError, subprocess.SubprocessError):
            continue
        return NOBODY, python
    raise UserError(
        f"root runs code as another user, who can read neither {sys.executable} nor /usr/bin/python3",
        fix="run the job as another user than root, or apt-get install python3",
    )


def _in_memory(content: bytes) -> int:
    """A file to be read, which no folder has."""
    descriptor = os.memfd_create("job")
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
