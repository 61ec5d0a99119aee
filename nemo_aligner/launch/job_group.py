# SPDX-License-Identifier: Apache-2.0
"""Runs jobs that need each other side by side on this machine, and ends them together. Knows no algorithm."""

import errno
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from nemo_aligner.launch.local import GRACE_SECONDS
from nemo_aligner.launch.stacks import STACKS_SIGNAL, forward_stacks_request
from nemo_aligner.launch.subprocesses import STARTER_VARIABLE, end, exit_code, stop_signals_handled
from nemo_aligner.run.progress import ProgressBar, read_line
from nemo_aligner.run.stop import Terminated
from nemo_aligner.serving.cleanup import end_abandoned

LOCAL = "127.0.0.1"
FIRST_PORT = 10000  # below are the well-known ones
GIVEN_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
POLL_SECONDS = 0.1
END_SECONDS = GRACE_SECONDS + 4.0  # for a job to end its own ranks and what they have started
CLOSING_SECONDS = 10.0  # for a server that was asked to stop to close its port


@dataclass(frozen=True, kw_only=True)
class Program:
    """A job to run.

    Attributes:
        log: file that its output is added to.
        environ: on top of this process's own.
        address: where it serves; None: it does not.
    """

    name: str
    command: Sequence[str]
    log: Path
    environ: Mapping[str, str] = field(default_factory=dict)
    address: tuple[str, int] | None = None


def free_ports(count: int, address: str = LOCAL) -> list[int]:
    """Ports of ``address`` that nobody listens on, each another one.

    None is of those that the system gives to whoever asks for any port: a job takes its port long after it was chosen.
    """
    draw, choice, ports = random.SystemRandom(), range(FIRST_PORT, _first_given_port()), []
    with ExitStack() as held:
        while len(ports) < count:
            port, probe = draw.choice(choice), held.enter_context(socket.socket())
            try:
                probe.bind((address, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                ports.append(port)
    return ports


def _first_given_port() -> int:
    try:
        first = int(GIVEN_PORTS.read_text().split()[0])
    except FileNotFoundError:
        first = 49152  # IANA's, as systems other than Linux have it
    return max(first, FIRST_PORT + 1000)


def run_job_group(leader: Program, servers: Sequence[Program]) -> int:
    """Run all of them until the leader and the servers have ended; their output goes to this terminal too.

    A job that ends badly ends the others: the leader is asked first (SIGTERM, at which jobs save), the servers after
    it. A server that the leader has left running when it ended well is asked too. SIGTERM, SIGUSR1 and SIGINT to this
    process do the same; SIGHUP, and a SIGTERM or SIGINT after another signal, end all of them within seconds. SIGUSR2
    has each job write the stacks of its ranks.

    Returns:
        The exit code of the first that ended badly, of those that nobody had asked to end; of the leader after SIGTERM;
        128 + N after another signal N.
    """
    jobs: list[_RunningProgram] = []
    programs = (*servers, leader)
    with stop_signals_handled(lambda _: None) as asked:
        try:
            for program in programs:
                jobs.append(_RunningProgram(program, width=max(len(one.name) for one in programs)))
            signal.signal(STACKS_SIGNAL, forward_stacks_request([(job.name, job.process) for job in jobs]))
            jobs[-1].leads = True
            code = _run(jobs[-1], jobs[:-1], asked)
            if code and signal.SIGINT in asked:
                _report(f"the same command goes on: {shlex.join(sys.orig_argv)}")
                return 128 + signal.SIGINT
            return code
        except Terminated as stop:
            _report(f"{stop.signal.name}: the jobs are stopped")
            return 128 + stop.signal
        finally:
            end([job.process for job in jobs], first=signal.SIGINT, seconds=END_SECONDS)
            for job in jobs:
                job.show_output(to_the_end=True)
                if job.process.returncode < 0 and job.program.address is not None:
                    # Its Triton would end after half a minute, its files stay.
                    end_abandoned("{}-{}".format(*job.program.address))


class _RunningProgram:
    """A program that runs; its log is read as it grows, so that it never waits for a terminal."""

    def __init__(self, program: Program, *, width: int) -> None:
        self.program, self.name = program, program.name
        self.was_asked = False
        self.leads = False  # its progress is what a person waits for
        self._bar: ProgressBar | None = None
        self._prefix, self._rest = f"{program.name:{width}} | ", b""
        program.log.parent.mkdir(parents=True, exist_ok=True)
        with program.log.open("ab") as out:
            self._log = program.log.open("rb")
            self._log.seek(0, os.SEEK_END)
            # A session of its own: Ctrl-C reaches this process alone, which then ends the jobs.
            self.process = subprocess.Popen(
                program.command,
                env=_environ(program),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        _report(f"{self.name}: {shlex.join(program.command)}\n{self.name}: output goes to {program.log}")

    @property
    def runs(self) -> bool:
        return self.process.poll() is None

    @property
    def failed(self) -> bool:
        """True if it has ended badly, and by itself."""
        return not self.was_asked and bool(self.process.poll())

    def ask(self) -> None:
        """Ask it to save and end."""
        if self.runs:
            self.was_asked = True
            self.process.send_signal(signal.SIGTERM)

    def show_output(self, *, to_the_end: bool = False) -> None:
        """Print what it has written since the last call, in whole lines."""
        *lines, self._rest = (self._rest + self._log.read()).split(b"\n")
        if to_the_end and self._rest:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            text = line.decode(errors="replace")
            progress = read_line(text)
            if progress is not None and self.leads and sys.stderr.isatty():
                self._show_bar(*progress)
            elif progress is None or self.leads:
                sys.stdout.write(f"{self._prefix}{text}\n")
            # How far a server has come follows from its leader, and stands in its log.
        sys.stdout.flush()
        if to_the_end and self._bar is not None:
            self._bar.close()

    def _show_bar(self, unit: str, step: int, total: int, text: str) -> None:
        if self._bar is None:
            self._bar = ProgressBar(total=total, start=step, enabled=True, name=self.name, unit=unit)
        self._bar.show(step, text)


def _environ(program: Program) -> dict[str, str]:
    # In a step that srun made of one task, each job is a world of its own, and not that task.
    own = {name: value for name, value in os.environ.items() if name != "SLURM_PROCID"}
    return own | {STARTER_VARIABLE: str(os.getpid())} | dict(program.environ)


def _run(leader: _RunningProgram, servers: Sequence[_RunningProgram], asked: Sequence[int]) -> int:
    jobs = [leader, *servers]
    _watch(jobs, lambda: bool(asked) or not leader.runs or any(job.failed for job in jobs))
    failed = next((job for job in jobs if job.failed), None)
    if asked:
        more = "; once more ends them at once" if asked[0] == signal.SIGINT else ""
        _report(
            f"{signal.Signals(asked[0]).name}: the jobs are asked to save and end, {leader.name} first{more}"
        )
    elif failed:
        others = " and ".join(job.name for job in jobs if job.runs) or "nothing"
        _report(
            f"{failed.name} has ended with exit code {exit_code(failed.process)}; asked to save and end: {others}"
        )
    leader.ask()
    _watch(jobs, lambda: not leader.runs)
    for server in servers:
        if exit_code(leader.process) == 0:
            _let_it_save(server, jobs)
        server.ask()
    _watch(jobs, lambda: not any(server.runs for server in servers))
    failed = failed or next((job for job in jobs if job.failed), leader)
    return exit_code(failed.process)


def _watch(jobs: Sequence[_RunningProgram], until: Callable[[], bool]) -> None:
    while not until():
        time.sleep(POLL_SECONDS)
        for job in jobs:
            job.show_output()


def _let_it_save(server: _RunningProgram, jobs: Sequence[_RunningProgram]) -> None:
    """Wait for a server that was asked to stop: it closes its port, and saves what a signal would interrupt."""
    until = time.monotonic() + CLOSING_SECONDS
    _watch(jobs, lambda: not server.runs or time.monotonic() > until)
    if not _listens(server.program.address):
        _watch(jobs, lambda: not server.runs)


def _listens(address: tuple[str, int] | None) -> bool:
    if address is None:
        return False
    try:
        with socket.create_connection(address, timeout=1.0):
            return True
    except OSError:
        return False


def _report(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
