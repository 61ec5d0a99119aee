# SPDX-License-Identifier: Apache-2.0
"""Whether AMX runs is found out without harm to this process, and kept off where it does not."""

import os
from pathlib import Path

import pytest

from nemo_aligner.launch.amx import LIMIT_VARIABLE, WITHOUT_AMX, amx_runs, decide

ADVERTISED = "processor\t: 0\nflags\t\t: fpu avx512_bf16 amx_bf16 amx_tile\n"


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CPU that advertises AMX, whatever this one is; the environment decides nothing and is restored."""
    monkeypatch.setenv(LIMIT_VARIABLE, "")
    del os.environ[LIMIT_VARIABLE]
    (tmp_path / "cpuinfo").write_text(ADVERTISED)
    return tmp_path / "cpuinfo"


def test_where_it_is_advertised_it_is_tried(cpuinfo: Path):
    line = decide(cpuinfo)
    assert line is not None
    if amx_runs():
        assert "AMX runs" in line
        assert LIMIT_VARIABLE not in os.environ
    else:
        assert "does not run" in line
        assert os.environ[LIMIT_VARIABLE] == WITHOUT_AMX


@pytest.mark.skipif("amx_bf16" in Path("/proc/cpuinfo").read_text(), reason="only the absence is certain")
def test_where_the_cpu_lacks_it_only_the_child_dies(capfd: pytest.CaptureFixture):
    assert not amx_runs()
    assert capfd.readouterr() == ("", "")


def test_the_environment_comes_first(cpuinfo: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(LIMIT_VARIABLE, "AVX2")
    assert decide(cpuinfo) is None
    assert os.environ[LIMIT_VARIABLE] == "AVX2"


def test_nothing_is_said_of_other_cpus(cpuinfo: Path):
    cpuinfo.write_text(ADVERTISED.replace("amx_bf16", ""))
    assert decide(cpuinfo) is None
    assert decide(cpuinfo.with_name("none")) is None
    assert LIMIT_VARIABLE not in os.environ
