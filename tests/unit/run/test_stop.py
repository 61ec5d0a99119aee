# SPDX-License-Identifier: Apache-2.0
"""Signals that a run notes, and a time limit that no clock's jump reaches."""

import os
import signal
import time

import pytest

from nemo_aligner.run import stop
from nemo_aligner.run.stop import StopRequest, TimeLimit, saved_code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_noted(number: int):
    with StopRequest(interrupts=True) as request:
        os.kill(os.getpid(), number)
        assert request.number == number


def test_a_second_ctrl_c_ends_at_once(monkeypatch: pytest.MonkeyPatch):
    with StopRequest(interrupts=True) as request:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same key, by way of the starter
        assert request.number == signal.SIGINT
        monkeypatch.setattr(stop, "SAME_KEY_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_ctrl_c_that_a_shell_has_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest(interrupts=True) as request:
            os.kill(os.getpid(), signal.SIGINT)
            assert request.number == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_exit_codes():
    numbers = (0, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    assert [saved_code(number) for number in numbers] == [0, 75, 75, 130]


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_a_clock_that_is_set_ends_no_run(monkeypatch: pytest.MonkeyPatch, jump: float):
    limit = TimeLimit(36_000.0)
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + jump)
    assert not limit.is_up
    limit.note("step", 36_000.0)
    assert limit.is_up
