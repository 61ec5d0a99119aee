# SPDX-License-Identifier: Apache-2.0
"""What a person sees: one bar below the log on a terminal, lines elsewhere."""

import os
import pty
import re
import subprocess
import sys

import pytest

from nemo_aligner.run.progress import read_line

TRAINS = """
import logging, sys
from nemo_aligner.run.progress import ProgressBar
logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S")
bar = ProgressBar(total=5, enabled=True)
for step in range(1, 6):
    bar.update(step, {"loss": 1 / step, "tokens_per_s": 100.0, "acc": 0.5})
    logging.getLogger().info("validation loss %d", step)
bar.close()
logging.getLogger().info("the end")
"""


def screen(output: str) -> list[str]:
    """The lines of a terminal after ``output``, by the few controls that a bar uses."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", output):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token.startswith("\x1b["):
            if token.endswith("A"):
                row -= int(token[2:-1] or 1)
            elif token.endswith("K"):
                lines[row] = ""
        else:
            lines[row] = lines[row][:column].ljust(column) + token + lines[row][column + len(token) :]
            column += len(token)
    return [line.rstrip() for line in lines if line.strip()]


def on_terminal(code: str, *, columns: int) -> str:
    """What a process writes to a terminal of that width."""
    master, slave = pty.openpty()
    env = os.environ | {"COLUMNS": str(columns), "TERM": "xterm-256color"}
    process = subprocess.Popen([sys.executable, "-c", code], stdin=slave, stdout=slave, stderr=slave, env=env)
    os.close(slave)
    output = b""
    try:
        while part := os.read(master, 1 << 16):
            output += part
    except OSError:  # how Linux says that the last writer has gone
        pass
    os.close(master)
    assert process.wait() == 0, output
    return output.decode()


@pytest.mark.parametrize("columns", [60, 100, 200])
def test_a_terminal_shows_the_log_and_one_bar(columns: int):
    lines = screen(on_terminal(TRAINS, columns=columns))
    log = [re.sub(r"^\[[\d:]+\] ", "", line) for line in lines if "train" not in line]
    assert log == [*(f"validation loss {step}" for step in range(1, 6)), "the end"]
    (bar,) = (line for line in lines if "train" in line)
    assert "5/5" in bar
    assert len(bar) <= columns
    assert lines.index(bar) == len(lines) - 2, "below the log of its time"


def test_elsewhere_there_are_lines():
    done = subprocess.run([sys.executable, "-c", TRAINS], capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if read_line(line)]
    assert read_line(lines[-1]) == ("step", 5, 5, "loss 0.2000  accuracy 0.500  100 tokens/s")
    assert done.stderr.count("validation loss") == 5


def test_other_lines_are_no_progress():
    for line in ("", "step 3/40", "[12:00:00] saved 3/40  x", "Traceback (most recent call last):"):
        assert read_line(line) is None
