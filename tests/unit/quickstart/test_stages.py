# SPDX-License-Identifier: Apache-2.0
"""What the quick starts' stages rest on: scripts that end, folders, and metrics read back."""

import os
import time
from pathlib import Path

import pytest

from examples.quickstart.stages import metric, new_folder, run

STUBBORN = """
import pathlib, signal, sys, time
def leave(*_):
    pathlib.Path(sys.argv[1]).write_text("asked")
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
time.sleep(60)
"""


def written(folder: Path, code: str) -> str:
    (folder / "script.py").write_text(code)
    return str(folder / "script.py")


def test_a_script_is_told_and_run(tmp_path: Path, capsys: pytest.CaptureFixture):
    code = "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(os.environ['OMP_NUM_THREADS'])"
    run(written(tmp_path, code), tmp_path / "found", threads=3)
    assert (tmp_path / "found").read_text() == "3"
    assert capsys.readouterr().out.startswith("$ python ")


def test_its_exit_code_is_ours(tmp_path: Path):
    with pytest.raises(SystemExit) as stop:
        run(written(tmp_path, "raise SystemExit(3)"))
    assert stop.value.code == 3


def test_one_that_takes_too_long_is_asked_to_end(tmp_path: Path):
    began = time.monotonic()
    with pytest.raises(SystemExit, match="not done after 2 s"):
        run(written(tmp_path, STUBBORN), tmp_path / "found", max_seconds=2)
    assert (tmp_path / "found").read_text() == "asked"
    assert time.monotonic() - began < 30


def test_the_newest_run_is_the_latest(tmp_path: Path):
    folder = new_folder(tmp_path / "results")
    assert os.path.samefile(tmp_path / "results/latest", folder)


def test_a_metric_leaves_out_lines_without_it():
    assert metric([{"step": 1, "loss": 2.0}, {"step": 1}, {"step": 2, "loss": 1.0}], "loss") == (
        [1, 2],
        [2.0, 1.0],
    )
