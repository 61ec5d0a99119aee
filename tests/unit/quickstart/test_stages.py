# SPDX-License-Identifier: Apache-2.0
"""What the quick starts' stages rest on: scripts that end, folders, and metrics read back."""

import os
from pathlib import Path

import pytest

from examples.quickstart.stages import metric, new_folder, run

SILENT = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def leave(*_):
    (folder / "left").write_text("asked")
    sys.exit(0)
signal.signal(signal.SIGUSR2, lambda *_: (folder / "stacks").write_text("shown"))
signal.signal(signal.SIGTERM, leave)
(folder / "ready").touch()
time.sleep(60)
"""
BUSY = """
import pathlib, sys, time
for line in range(20):
    time.sleep(0.2)
    with (pathlib.Path(sys.argv[1]) / "log").open("a") as file:
        file.write(f"{line}\\n")
"""


def written(folder: Path, code: str) -> str:
    (folder / "script.py").write_text(code)
    return str(folder / "script.py")


def test_a_script_is_reported_and_run(tmp_path: Path, capsys: pytest.CaptureFixture):
    code = "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(os.environ['OMP_NUM_THREADS'])"
    run(written(tmp_path, code), tmp_path / "found", threads=3)
    assert (tmp_path / "found").read_text() == "3"
    assert capsys.readouterr().out.startswith("$ python ")


def test_its_exit_code_is_ours(tmp_path: Path):
    with pytest.raises(SystemExit) as stop:
        run(written(tmp_path, "raise SystemExit(3)"))
    assert stop.value.code == 3


def test_one_that_writes_nothing_shows_its_stacks_and_is_asked_to_end(tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(SystemExit, match=r"written nothing into .*run for 5 s[\s\S]*Fix: read"):
        run(written(tmp_path, SILENT), folder, folder=folder, patience=5)
    assert (folder / "left").read_text() == "asked"
    assert (folder / "stacks").read_text() == "shown"


def test_one_that_writes_is_waited_for_however_long_it_takes(tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    run(written(tmp_path, BUSY), folder, folder=folder, patience=3)
    assert (folder / "log").read_text().splitlines()[-1] == "19"


def test_the_newest_run_is_the_latest(tmp_path: Path):
    folder = new_folder(tmp_path / "results")
    assert os.path.samefile(tmp_path / "results/latest", folder)


def test_a_metric_leaves_out_lines_without_it():
    assert metric([{"step": 1, "loss": 2.0}, {"step": 1}, {"step": 2, "loss": 1.0}], "loss") == (
        [1, 2],
        [2.0, 1.0],
    )
