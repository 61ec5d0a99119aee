# SPDX-License-Identifier: Apache-2.0
"""How scripts end, in a process of their own: message, fix last, exit code, nothing overwritten."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_aligner.errors import UserError
from nemo_aligner.launch.cli import USER_ERROR_CODE, conversion, run_cli

ROOT = Path(__file__).parents[3]
SCRIPTS = ROOT / "examples/nlp/gpt"


def fail_with(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "message"),
    [
        (lambda: None, 0, ""),
        (fail_with(UserError("a=1 is wrong", fix="set a=2")), 2, "error: a=1 is wrong\nFix: set a=2\n"),
        (fail_with(KeyboardInterrupt()), 130, "stopped\n"),
    ],
)
def test_endings(main: Callable[[], None], code: int, message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        run_cli(main)
    assert left.value.code == code
    assert capsys.readouterr().err == message


def test_a_file_that_cannot_be_read_is_reported_plainly(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        run_cli(lambda: (tmp_path / "nothing").read_text() and None)
    assert left.value.code == USER_ERROR_CODE
    assert f"{tmp_path}/nothing" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_cli(fail_with(ZeroDivisionError()))


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["inmodel=a", "out=b"], "did you mean model=?"),
        (["model=a", "--out-file", "x=1.nemo", "overwrites=True"], "did you mean overwrite=?"),
        (["model=a", "out=b", "lr=1"], "known settings: model, out, overwrite"),
    ],
)
def test_a_tool_names_the_setting_that_it_does_not_know(
    words: list[str], fix: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["import_hf.py", *words])
    with pytest.raises(UserError, match="unknown setting") as caught:
        conversion("A tool.", takes="a model")(lambda *_: None)()
    assert caught.value.fix == fix


def test_a_path_may_hold_an_equals_sign(monkeypatch: pytest.MonkeyPatch):
    given: list[object] = []
    monkeypatch.setattr(sys, "argv", ["import_hf.py", "--in-file", "x=1", "out=y=2", "overwrite=True"])
    conversion("A tool.", takes="a model")(lambda *arguments: given.extend(arguments))()
    assert given == [Path("x=1"), "y=2", True]


@pytest.mark.parametrize(
    ("script", "source", "out", "last_line"),
    [
        ("import_hf.py", "--in-file=nothing", "new.nemo", "Fix: give a Hugging Face folder"),
        ("export_hf.py", "--in-file=cut.nemo", "new", "Fix: get the file again"),
        ("convert_nemo_gpt_to_mcore.py", "--in-folder=empty", "new.nemo", "Fix: give a .nemo file"),
        ("convert_hf_llama_to_nemo.py", "--in-file=empty", "cut.nemo", "Fix: give another output"),
    ],
)
def test_scripts_refuse_with_the_fix_last(tmp_path: Path, script: str, source: str, out: str, last_line: str):
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.nemo").write_bytes(b"cut")
    command = [sys.executable, str(SCRIPTS / script), source, f"--out-file={out}"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == USER_ERROR_CODE
    assert done.stderr.splitlines()[-1].startswith(last_line)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.nemo", "empty"]
    assert (tmp_path / "cut.nemo").read_bytes() == b"cut"
