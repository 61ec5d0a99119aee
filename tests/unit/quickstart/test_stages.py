# SPDX-License-Identifier: Apache-2.0
"""Two processes side by side: whichever ends, and however, neither is left."""

import os
from pathlib import Path

import pytest

from examples.quickstart.stages import metric, new_folder, run_beside

SERVER = """
import os, pathlib, signal, sys, time
def leave(*_):
    pathlib.Path("asked").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
pathlib.Path("pid").write_text(str(os.getpid()))
print("serving", flush=True)
time.sleep(60)
"""
WAITS = """
import pathlib, time
while not pathlib.Path("pid").exists():
    time.sleep(0.01)
"""


def beside(folder: Path, *, server: str, script: str, max_seconds: float = 30.0) -> None:
    paths = []
    for name, code in (("server.py", server), ("script.py", script)):
        paths.append(folder / name)
        paths[-1].write_text(f"import os; os.chdir({str(folder)!r})\n{code}")
    run_beside(
        (paths[0], "a=1"), (paths[1], "b=2"), server_log=folder / "server.log", max_seconds=max_seconds
    )


def is_gone(folder: Path) -> bool:
    return not Path(f"/proc/{(folder / 'pid').read_text()}").exists()


def test_the_server_is_asked_to_end_when_the_script_has(tmp_path: Path, capsys: pytest.CaptureFixture):
    beside(tmp_path, server=SERVER, script=WAITS)
    assert (tmp_path / "asked").exists()
    assert is_gone(tmp_path)
    assert (tmp_path / "server.log").read_text() == "serving\n"
    assert capsys.readouterr().out.count("$ python") == 2


@pytest.mark.parametrize(
    ("server", "script", "max_seconds", "told"),
    [
        (SERVER, WAITS + "raise SystemExit(3)", 30.0, "the script ended with exit code 3"),
        (
            "raise SystemExit(4)",
            "import time; time.sleep(60)",
            30.0,
            "the server ended early, with exit code 4",
        ),
        (SERVER, WAITS + "time.sleep(60)", 2.0, "not done after 2 s"),
    ],
    ids=["script", "server", "time"],
)
def test_a_failure_is_told(tmp_path: Path, server: str, script: str, max_seconds: float, told: str):
    with pytest.raises(SystemExit, match=told):
        beside(tmp_path, server=server, script=script, max_seconds=max_seconds)
    assert server != SERVER or is_gone(tmp_path)


def test_the_newest_run_is_the_latest(tmp_path: Path):
    folder = new_folder(tmp_path / "results")
    assert os.path.samefile(tmp_path / "results/latest", folder)


def test_a_metric_leaves_out_lines_without_it():
    assert metric([{"step": 1, "loss": 2.0}, {"step": 1}, {"step": 2, "loss": 1.0}], "loss") == (
        [1, 2],
        [2.0, 1.0],
    )
