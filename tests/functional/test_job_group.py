# SPDX-License-Identifier: Apache-2.0
"""Jobs side by side and their common end, with programs of a few lines in the place of jobs."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from nemo_aligner.launch.job_group import free_ports

# Runs LEADER and SERVER, each a Python text.
TOGETHER = """
import sys
from pathlib import Path
from nemo_aligner.launch import job_group
leader, server, port = sys.argv[1:]
def program(name, text, address=None):
    command = [sys.executable, "-uc", text]
    return job_group.Program(name=name, command=command, log=Path(name, "output.log"), address=address)
job_group.CLOSING_SECONDS = 1.0
sys.exit(job_group.run_job_group(program("lead", leader), [program("serve", server, ("127.0.0.1", int(port)))]))
"""
QUICK = "print('done')"
FOREVER = "import time; print('up'); time.sleep(600)"
# Ends as a job does that is asked to.
SAVING = """
import signal, sys, time
def save(*_):
    print("saved"); sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("up"); time.sleep(600)
"""
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); time.sleep(600)"
SECONDS = 20


class Running:
    """The process that runs both."""

    def __init__(self, folder: Path, leader: str, server: str, port: int) -> None:
        self._out = folder / "out"
        with self._out.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", TOGETHER, leader, server, str(port)],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    def wait_for(self, *texts: str) -> list[psutil.Process]:
        """Until all stand in the output; the jobs."""
        deadline = time.monotonic() + SECONDS
        while any(text not in self.out for text in texts):
            assert time.monotonic() < deadline, self.out
            time.sleep(0.05)
        return psutil.Process(self.process.pid).children()

    def wait(self) -> int:
        return self.process.wait(SECONDS)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def begin(leader: str, server: str, port: int | None = None) -> Running:
        started.append(Running(tmp_path, leader, server, port or free_ports(1)[0]))
        return started[-1]

    yield begin
    for one in started:
        for child in psutil.Process(one.process.pid).children() if one.process.poll() is None else []:
            child.kill()
        one.process.kill()
        one.process.wait()


def test_output_goes_to_the_terminal_and_to_a_file(run: Callable, tmp_path: Path):
    one = run("print('a'); print('b', end='')", "import time; time.sleep(0.5); print('é')")
    assert one.wait() == 0
    lines = one.out.splitlines()
    assert "lead  | a" in lines
    assert "lead  | b" in lines
    assert "serve | é" in lines
    assert (tmp_path / "lead/output.log").read_text() == "a\nb"
    again = run("print('c')", QUICK)
    assert again.wait() == 0
    assert "lead  | a" not in again.out
    assert (tmp_path / "lead/output.log").read_text() == "a\nbc\n"


@pytest.mark.parametrize(
    ("leader", "server", "code", "told"),
    [
        ("raise SystemExit(3)", SAVING, 3, "lead has ended with exit code 3; asked to save and end: serve"),
        (SAVING, "raise SystemExit(2)", 2, "serve has ended with exit code 2; asked to save and end: lead"),
        (SAVING, "import os; os.kill(os.getpid(), 9)", 137, "serve has ended with exit code 137"),
        (QUICK, "import time; time.sleep(1); raise SystemExit(4)", 4, "lead  | done"),
    ],
    ids=["leader", "server", "killed", "afterwards"],
)
def test_one_bad_end_is_the_others_end(run: Callable, leader: str, server: str, code: int, told: str):
    # The bad one ends when the other is up: half a second is enough for four lines of Python.
    wait = "import time; time.sleep(1)\n"
    one = run(wait + leader if leader != SAVING else leader, wait + server if server != SAVING else server)
    assert one.wait() == code, one.out
    assert told in one.out
    if SAVING in (leader, server):
        assert " | saved" in one.out


def test_a_free_port_is_none_that_the_system_gives_others():
    """Connections that other programs make take ports for themselves at any time, of the system's range."""
    ports = free_ports(200)
    assert len(set(ports)) == 200
    given = []
    for _ in range(200):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            given.append(probe.getsockname()[1])
    assert 1024 <= min(ports) <= max(ports) < min(given)


def test_a_server_that_was_left_running_is_asked(run: Callable):
    (port,) = free_ports(1)
    listening = f"import socket; s = socket.create_server(('127.0.0.1', {port}))\n"
    one = run("import time; time.sleep(1)", listening + SAVING, port)
    assert one.wait() == 0
    assert "serve | saved" in one.out


def test_a_server_that_has_closed_its_port_may_save_in_peace(run: Callable):
    one = run(QUICK, SAVING.replace("time.sleep(600)", "time.sleep(3); print('whole')"))
    assert one.wait() == 0
    assert "serve | whole" in one.out
    assert "serve | saved" not in one.out


def test_sigterm_has_the_leader_save_first(run: Callable):
    slow = SAVING.replace('print("saved")', 'time.sleep(1); print("saved")')
    one = run(slow, SAVING)
    one.wait_for("lead  | up", "serve | up")
    one.process.send_signal(signal.SIGTERM)
    assert one.wait() == 75
    assert one.out.index("lead  | saved") < one.out.index("serve | saved")


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_signals_that_do_not_wait(run: Callable, first: signal.Signals):
    one = run(DEAF if first == signal.SIGTERM else FOREVER, FOREVER)
    jobs = one.wait_for("lead  | up", "serve | up")
    assert len(jobs) == 2
    began = time.monotonic()
    one.process.send_signal(first)
    if first == signal.SIGTERM:
        one.wait_for("asked to save and end, lead first")
        one.process.send_signal(first)
    assert one.wait() == 128 + first
    assert time.monotonic() - began < 10
    assert not any(job.is_running() for job in jobs)


def test_jobs_are_asked_to_end_when_their_starter_is_gone(run: Callable, tmp_path: Path):
    follow = (
        "import signal\nfrom nemo_aligner.launch.subprocesses import follow_parent as f\nf(signal.SIGTERM)\n"
    )
    one = run(follow + SAVING, follow + SAVING)
    jobs = one.wait_for("lead  | up", "serve | up")
    one.process.kill()
    _, alive = psutil.wait_procs(jobs, timeout=SECONDS)
    assert alive == []
    assert (tmp_path / "serve/output.log").read_text() == "up\nsaved\n"
