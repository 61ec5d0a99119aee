# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a folder, and no lock that outlives its run."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nemo_aligner.errors import UserError
from nemo_aligner.run import lock as module
from nemo_aligner.run.lock import STALE_SECONDS, FolderLock, Holder

KEY = "exp_manager.explicit_log_dir"


def lock(folder: Path) -> FolderLock:
    return FolderLock(folder, setting=KEY)


@pytest.fixture
def other() -> Iterator[subprocess.Popen]:
    """A process that lives until the test ends."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def left(tmp_path: Path) -> Callable[..., Path]:
    """Leaves a lock in the folder, of a holder like this process but for what is changed, of some age in seconds."""

    def leave(*, age: float = 0.0, **changed: object) -> Path:
        path = tmp_path / "run.lock"
        path.write_text(json.dumps(asdict(replace(Holder.me(), **changed))))
        os.utime(path, (time.time() - age,) * 2)
        return path

    return leave


def test_the_second_is_refused_by_name_until_the_first_gives_it_back(tmp_path: Path):
    first, second = lock(tmp_path), lock(tmp_path)
    assert first.take()
    for ask in (second.take, second.refuse_if_held):
        with pytest.raises(UserError) as caught:
            ask()
        text = str(caught.value)
        assert all(
            word in text for word in (f"{KEY}={tmp_path}", f"process {os.getpid()} on ", "since ", "Fix: ")
        )
    first.give_back()
    assert list(tmp_path.iterdir()) == []
    assert second.take()
    first.give_back()  # of what is no longer its own, nothing
    assert (tmp_path / "run.lock").exists()
    second.give_back()


def test_a_killed_holder_on_this_machine_is_followed_at_once(
    tmp_path: Path, other: subprocess.Popen, left: Callable
):
    left(pid=other.pid, started=module._age_at_boot(other.pid))
    with pytest.raises(UserError, match=f"process {other.pid} on "):
        lock(tmp_path).take()
    other.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # a zombie is dead, too
    mine = lock(tmp_path)
    assert mine.take()
    mine.give_back()


def test_another_process_under_the_holders_id_is_no_holder(
    tmp_path: Path, other: subprocess.Popen, left: Callable
):
    left(pid=other.pid, started=module._age_at_boot(other.pid) - 3600)
    mine = lock(tmp_path)
    assert mine.take()
    mine.give_back()


def test_a_holder_elsewhere_is_dead_when_it_has_not_been_heard_for_long(tmp_path: Path, left: Callable):
    path = left(host="far", domain="another boot", age=STALE_SECONDS / 2)
    mine = lock(tmp_path)
    mine.refuse_if_held()  # it cannot know
    assert not mine.take()
    os.utime(path, (time.time() - STALE_SECONDS - 5,) * 2)
    # A machine whose clock went back is as dead.
    mine = lock(tmp_path)
    assert mine.take()
    mine.give_back()


def test_a_holder_elsewhere_that_is_heard_of_is_left_alone(tmp_path: Path, left: Callable):
    path = left(host="far", domain="another boot", age=STALE_SECONDS / 2)
    mine = lock(tmp_path)
    assert not mine.take()
    os.utime(path)
    with pytest.raises(UserError, match=r"process \d+ on far"):
        mine.take()


@pytest.mark.parametrize("content", [b"", b"\x00" * 80, b"[]", b'{"pid": 1}'], ids=len)
def test_a_lock_that_cannot_be_read_goes_by_its_age(tmp_path: Path, content: bytes):
    path = tmp_path / "run.lock"
    path.write_bytes(content)
    assert not lock(tmp_path).take()
    os.utime(path, (time.time() - STALE_SECONDS - 5,) * 2)
    mine = lock(tmp_path)
    assert mine.take()
    mine.give_back()


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_that_come_at_once_one_has_it(tmp_path: Path, left: Callable, stale: bool):
    if stale:
        left(host="far", domain="another boot", age=STALE_SECONDS + 5)
    locks, taken = [lock(tmp_path) for _ in range(8)], []

    def take(one: FolderLock) -> None:
        try:
            if one.take():
                taken.append(one)
        except UserError:
            pass

    threads = [threading.Thread(target=take, args=(one,)) for one in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (holder,) = taken
    holder.give_back()
    assert list(tmp_path.iterdir()) == []


def test_who_has_lost_the_folder_is_reported(tmp_path: Path, left: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    mine = lock(tmp_path)
    assert mine.take()
    path = tmp_path / "run.lock"
    before = path.stat().st_mtime_ns
    deadline = time.monotonic() + 30
    while path.stat().st_mtime_ns == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    left(host="far", pid=7)
    while mine.lost_to is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert mine.lost_to.startswith("process 7 on far")
    mine.give_back()
    assert path.exists()
