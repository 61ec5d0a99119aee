# SPDX-License-Identifier: Apache-2.0
"""Code in the sandbox: what is right passes, and what is hostile does no harm and gets no reward."""

import contextlib
import os
import threading
import time
from pathlib import Path

import pytest

from nemo_aligner.environments.code import passes
from nemo_aligner.environments.sandbox import Limits, run
from nemo_aligner.environments.workers import WorkerPool

ADD = "def add(a, b):\n    return a + b\n"
TESTS = ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'"]


@pytest.mark.parametrize(
    ("response", "tests", "reward"),
    [
        (ADD, TESTS, 1.0),
        (f"First:\n```python\nbroken(\n```\nthen\n```python\n{ADD}```\nDone.", TESTS, 1.0),
        (f"```\n{ADD}", TESTS, 1.0),
        (ADD, "\n".join(TESTS), 1.0),
        (ADD.replace("+", "-"), TESTS, 0.0),
        ("def add(a, b):\n    return 3", TESTS, 0.5),
        (
            "import math\ndef area(r):\n    return math.pi * r * r",
            "import math\nassert math.isclose(area(1), math.pi)",
            1.0,
        ),
        ("def f():\n    return (1, 2)", ["assert f() == [1, 2]"], 0.0),
        ("def f():\n    return {3: {1, 2}, 'a': None}", ["assert f() == {'a': None, 3: {2, 1}}"], 1.0),
        (
            "print(sum(map(int, input().split())))",
            [{"input": "2 3", "output": "5\n"}, {"input": "1", "output": "2"}],
            0.5,
        ),
        (
            "import sys\nfor line in sys.stdin:\n    print(line[::-1].strip(), ' ')",
            [{"input": "ab\ncd\n", "output": "ba\ndc"}],
            1.0,
        ),
        ("print(1)\nraise SystemExit(3)", [{"input": "", "output": "1"}], 0.0),
        (
            "from collections import Counter\nimport heapq, itertools, re, json, random, decimal, datetime\n"
            "def f(x):\n    return Counter(x).most_common(1)",
            ["assert f('aab') == [('a', 2)]"],
            1.0,
        ),
    ],
)
def test_a_reward_is_the_share_of_tests_that_are_passed(response: str, tests: list, reward: float):
    assert passes(response=response, row={"tests": tests}, partial=True) == reward
    assert passes(response=response, row={"tests": tests}) == float(reward == 1)


def test_rows_without_tests_are_told():
    with pytest.raises(KeyError, match=r"no 'tests', but text: set arguments\.tests"):
        passes(response=ADD, row={"text": ""})
    with pytest.raises(ValueError, match="no assertion"):
        passes(response=ADD, row={"tests": "add(1, 2)"})
    with pytest.raises(ValueError, match="tests are int"):
        passes(response=ADD, row={"tests": 3})
    with pytest.raises(ValueError, match="a test has input, and not input and output"):
        passes(response=ADD, row={"tests": [{"input": ""}]})


# Each is executed, and then asked what add(1, 2) is.
HOSTILE = dict(
    part.split("\n", 1)
    for part in (Path(__file__).parents[2] / "fixtures/hostile_code.txt").read_text().split("### ")[1:]
)


def test_hostile_code_does_no_harm_and_gets_no_reward(tmp_path: Path):
    """500 responses: none hangs, none leaves anything behind, and all others are judged as ever."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o777)  # what another user may write to is safe, too
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("kept")
    old.chmod(0o666)
    places = {"{file}": str(new), "{old}": str(old), "{folder}": str(tmp_path), "{parent}": str(os.getpid())}
    each: list[tuple[str, str]] = []
    for number in range(1, 15):
        for name, text in HOSTILE.items():
            for place, value in {**places, "{n}": str(number % 9)}.items():
                text = text.replace(place, value)
            each.append((name, text))
    assert len(each) >= 500
    calls = [
        {"response": text, "row": {"tests": ["assert add(1, 2) == 3"]}, "seconds": 0.5} for _, text in each
    ]
    fine = [{"response": ADD, "row": {"tests": TESTS}}] * 50
    began, threads = time.monotonic(), threading.active_count()
    with WorkerPool("reward", "nemo_aligner.environments.code.passes", workers=4, seconds=30) as pool:
        replies = pool.call_all([*calls[:250], *fine, *calls[250:], *fine])
    seconds = time.monotonic() - began
    judged = replies[250:300] + replies[-50:]
    del replies[250:300], replies[-50:]
    assert {reply.value for reply in judged} == {1.0}
    told = [(name, reply) for (name, _), reply in zip(each, replies, strict=True)]
    assert not [one for one in told if one[1].value != 0.0]
    assert old.read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert threading.active_count() == threads
    assert seconds < 250


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives up being root")
def test_root_is_nobody_in_the_sandbox():
    found = run("import os\nprint(os.getuid(), os.getgid())", limits=Limits())
    assert found.output == "65534 65534\n"
    assert found.problem == ""


def test_code_does_the_same_each_time():
    first, again = (run("print(hash('a'), {'a', 'b', 'c'})", limits=Limits()) for _ in range(2))
    assert first.output == again.output


def test_code_ends_with_the_worker_that_runs_it():
    call = {
        "response": "import time\ntime.sleep(1000)  # for the worker",
        "row": {"tests": TESTS},
        "seconds": 900,
    }
    with WorkerPool("reward", "nemo_aligner.environments.code.passes", workers=1, seconds=1) as pool:
        (reply,) = pool.call_all([call])
        assert reply.lost == "it took longer than 1 s"
        deadline = time.monotonic() + 20
        while (left := sandboxes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left


def sandboxes() -> list[str]:
    """The processes that are in a sandbox: by the filter of their system calls."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            if "Seccomp:\t2" in status.read_text() and "python" in (status.parent / "cmdline").read_text():
                found.append(status.parent.name)
    return found


def test_what_ended_code_is_told():
    limits = Limits(seconds=0.5, output=1000)
    assert run("while True: pass", limits=limits).problem == "it took longer than 0.5 s"
    assert run("print('x' * 2000)", limits=limits).problem == "it wrote more than 1000 bytes"
    assert run("x = 1 / 0", limits=limits).problem == "ZeroDivisionError: division by zero"
    assert run("import socket\nsocket.socket()", limits=limits).problem.startswith("PermissionError")
    assert run("def f(:", limits=limits).problem.startswith("SyntaxError")
