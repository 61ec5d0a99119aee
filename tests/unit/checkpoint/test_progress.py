# SPDX-License-Identifier: Apache-2.0
"""Long work is logged, short work is not."""

import logging
import time

import pytest

from nemo_aligner.checkpoint.progress import Progress


def test_lines_come_at_intervals(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    caplog.set_level(logging.INFO)
    progress = Progress("reading x", total=40, unit="tensors")
    for _ in range(20):
        now += 1.0
        progress.advance(2)
    assert caplog.messages == [f"reading x: {n} of 40 tensors ({n * 100 // 40} %)" for n in (10, 20, 30, 40)]
