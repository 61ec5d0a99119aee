# SPDX-License-Identifier: Apache-2.0
"""Calls of a person's function: in order, within their time, and none that harms another one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nemo_aligner.environments.workers import Reply, WorkerPool
from nemo_aligner.errors import UserError

FUNCTIONS = """
import ctypes, os, subprocess, sys, time

def double(x):
    return 2 * x

def act(what, x=0):
    match what:
        case "hang":
            time.sleep(1000)
        case "spin":
            while True:
                pass
        case "crash":
            ctypes.string_at(0)
        case "exit":
            os._exit(0)
        case "quit":
            sys.exit("enough")
        case "raise":
            return 1 / 0
        case "print":
            print("not for " * 1000)
            os.write(1, b"nobody")
        case "child":
            child = subprocess.Popen(["sleep", "1000"])
            open(x, "w").write(str(child.pid))
            time.sleep(1000)
        case "fill":
            return len(bytearray(x))
        case "text":
            return "x" * x
        case "odd":
            return object()
        case "sleep":
            time.sleep(x)
            return os.getpid()
    return x
"""


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., WorkerPool]]:
    """Opens pools of functions in the folder of the command."""
    (tmp_path / "things_to_do.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    opened: list[WorkerPool] = []

    def open_pool(name: str, *, workers: int = 2, seconds: float = 30.0, **given: int) -> WorkerPool:
        opened.append(WorkerPool("reward", f"things_to_do.{name}", workers=workers, seconds=seconds, **given))
        return opened[-1]

    yield open_pool
    for one in opened:
        one.close()


def test_replies_come_in_the_order_of_the_calls(pool: Callable[..., WorkerPool]):
    doubled = pool("double", workers=3)
    assert [reply.value for reply in doubled.call_all([{"x": x} for x in range(50)])] == list(
        range(0, 100, 2)
    )
    assert doubled.call_all([]) == []
    assert doubled.call_all([{"x": "ab"}]) == [Reply(value="abab")]


def test_no_call_harms_another_one(pool: Callable[..., WorkerPool]):
    """Whatever one does, in whichever worker the next one is."""
    kinds = ["raise", "crash", "odd", "exit", "print", "quit", "hang", "spin"]
    calls = [call for kind in kinds for call in ({"what": kind, "x": 1}, {"what": "fine", "x": 7})]
    replies = pool("act", seconds=1.0).call_all(calls)
    assert [reply.value for reply in replies[1::2]] == [7] * len(kinds)
    told = dict(zip(kinds, replies[::2], strict=True))
    assert told["print"] == Reply(value=1)
    assert told["raise"].error.startswith("ZeroDivisionError: division by zero (")
    assert told["raise"].error.endswith("things_to_do.py, line 21)")
    assert told["odd"].error.startswith("TypeError")
    assert told["quit"].error.startswith("SystemExit: enough")
    assert told["crash"].lost == told["exit"].lost == "its process ended, by a crash or for want of memory"
    assert told["hang"].lost == told["spin"].lost == "it took longer than 1 s"


def test_a_calls_time_begins_with_its_work(pool: Callable[..., WorkerPool]):
    """Eight calls of 0.4 s on two workers wait for longer than the limit of one."""
    replies = pool("act", workers=2, seconds=1.2).call_all([{"what": "sleep", "x": 0.4}] * 8)
    assert [reply.lost for reply in replies] == [""] * 8
    assert len({reply.value for reply in replies}) == 2


def test_memory_beyond_the_limit_is_refused(pool: Callable[..., WorkerPool]):
    replies = pool("act", memory=200 << 20).call_all(
        [{"what": "fill", "x": x << 20} for x in (100, 300, 100)]
    )
    assert [reply.value for reply in replies] == [100 << 20, None, 100 << 20]
    assert replies[1].error.startswith("MemoryError")


def test_a_long_reply_is_whole(pool: Callable[..., WorkerPool]):
    (reply,) = pool("act").call_all([{"what": "text", "x": 10_000_000}])
    assert reply.value == "x" * 10_000_000


def test_what_a_call_has_started_ends_with_it(pool: Callable[..., WorkerPool], tmp_path: Path):
    (reply,) = pool("act", seconds=1.0).call_all([{"what": "child", "x": str(tmp_path / "child")}])
    assert reply.lost == "it took longer than 1 s"
    wait_for_end(int((tmp_path / "child").read_text()))


def test_thousands_of_calls_leave_nothing_behind(pool: Callable[..., WorkerPool]):
    each = [{"what": "fine"}] * 40 + [{"what": "exit"}] * 10
    busy = pool("act")
    busy.call_all(each)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        busy.call_all(each)
    assert len(os.listdir("/proc/self/fd")) == before
    busy.close()


def test_all_ends_with_who_has_asked(tmp_path: Path):
    """A caller that is killed, with a call on its way."""
    (tmp_path / "things_to_do.py").write_text(FUNCTIONS)
    script = """if True:
        from nemo_aligner.environments.workers import WorkerPool
        pool = WorkerPool("reward", "things_to_do.act", workers=1, seconds=1000)
        (reply,) = pool.call_all([{"what": "sleep", "x": 0}])
        print(pool._host.pid, reply.value, flush=True)
        pool.call_all([{"what": "spin"}])
    """
    caller = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert caller.stdout is not None
    host, worker = map(int, caller.stdout.readline().split())
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    for process in (host, worker):
        wait_for_end(process)


def wait_for_end(process: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            stat = Path(f"/proc/{process}/stat").read_text()
        except OSError:
            return
        if stat.rpartition(")")[2].split()[0] == "Z":  # nobody waits for it here
            return
        time.sleep(0.05)
    raise AssertionError(f"process {process} is there")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("things_to_do.nothing", "cannot be imported: AttributeError"),
        ("things_to_do.os", "cannot be imported: TypeError: things_to_do.os is no function"),
        ("nowhere_to_be.found", "cannot be imported: ModuleNotFoundError: No module named 'nowhere_to_be'"),
        ("broken_things.f", "cannot be imported: SyntaxError"),
        ("leaving.f", "cannot be imported: its process ended meanwhile"),
        ("alone", "names no module"),
    ],
)
def test_what_cannot_be_called_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
):
    (tmp_path / "things_to_do.py").write_text(FUNCTIONS)
    (tmp_path / "broken_things.py").write_text("def f(:\n")
    (tmp_path / "leaving.py").write_text("import os\nos._exit(3)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as found:
        WorkerPool("trainer.ppo.rewards.a.function", name, workers=1, seconds=1)
    assert f"trainer.ppo.rewards.a.function={name} {words}" in found.value.problem
    assert str(tmp_path) in found.value.fix


def test_a_worker_begins_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A person's function of one line should not wait for it, nor hold its memory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loaded.py").write_text("import sys\ndef modules():\n    return sorted(sys.modules)\n")
    with WorkerPool("reward", "loaded.modules", workers=1, seconds=10) as modules:
        (reply,) = modules.call_all([{}])
    assert "nemo_aligner" in reply.value
    assert not {"torch", "numpy", "megatron"} & set(reply.value)


def test_what_an_episode_has_started_ends_with_its_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where the worker ends by itself, and where all end together."""
    (tmp_path / "starting.py").write_text(
        "import os, subprocess\n"
        "class Starts:\n"
        "    def reset(self, row, seed):\n"
        "        self.child = subprocess.Popen(['sleep', '1000'])\n"
        "    def step(self, turn):\n"
        "        open(turn, 'w').write(str(self.child.pid))\n"
        "        if turn.endswith('crash'):\n"
        "            os._exit(1)\n"
        "        return None, 1.0\n"
    )
    monkeypatch.chdir(tmp_path)
    begin = {"arguments": {}, "row": {}, "seed": 0}
    with WorkerPool("reward", "starting.Starts", workers=2, seconds=30, episodes=True) as pool:
        calls = [{"turn": str(tmp_path / name), "begin": begin} for name in ("crash", "fine")]
        replies = pool.call_all(calls)
        assert [reply.value for reply in replies] == [None, [None, 1.0]]
    for name in ("crash", "fine"):
        wait_for_end(int((tmp_path / name).read_text()))
