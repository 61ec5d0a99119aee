# SPDX-License-Identifier: Apache-2.0
"""The lines that the sides print are read alike, and each side runs with the allocator it is said to."""

from pathlib import Path

import pytest

from benchmarks.processes import ALLOCATORS, Measured, measure, started, wait_for

# As the peers' scripts print them.
TRL = (
    "loss_type nll\nRESULT sft: 427.2 tok/s | 4794.4 ms/step mean, 3092.1 median, min 2707.7 | cpu/step user 3.74s "
    "sys 2.76s minflt 1234425 => 315.1 tok/core-s | 2048 tok/step | peakRSS 2.97 GiB | load 15.95 | tokens = 8 rows"
)
PLAIN = (
    "RESULT plain_torch_sft: 2093.1 tok/s mean 978.5 ms, min 959.4 ms | cpu/step user 1.93 sys 0.01 minflt 5460 | "
    "peakRSS 2.78 GiB load 11.93"
)


@pytest.mark.parametrize(
    ("text", "seconds", "cpu", "faults", "peak"),
    [(TRL, 4.7944, 6.5, 1234425, 2.97), (PLAIN, 0.9785, 1.94, 5460, 2.78)],
)
def test_a_result_line_is_read(text: str, seconds: float, cpu: float, faults: float, peak: float):
    found = Measured.parse(text)
    assert found.seconds_per_step == pytest.approx(seconds)
    assert found.cpu_seconds_per_step == pytest.approx(cpu)
    assert (found.page_faults_per_step, found.peak_gib) == (faults, peak)


def test_a_run_without_a_result_is_an_error():
    with pytest.raises(ValueError, match="no RESULT line"):
        Measured.parse("loss_type nll")


def test_each_run_has_its_allocator_threads_and_an_empty_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    code = "import os; print([v for k, v in sorted(os.environ.items()) if k[:4] in ('MALL', 'OMP_')], os.listdir())"
    assert measure(["-c", code]).strip() == "['2'] []"
    kept = list(dict(sorted(ALLOCATORS["keeping allocator"].items())).values())
    assert measure(["-c", code], allocator="keeping allocator").strip() == f"{[*kept, '2']} []"


def test_a_run_that_fails_tells_why(tmp_path: Path):
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit('no such thing')")
    with pytest.raises(SystemExit, match="no such thing"):
        measure([str(script)])


def test_jobs_run_beside_each_other_each_with_its_allocator_and_threads(tmp_path: Path):
    code = "import os; print([v for k, v in sorted(os.environ.items()) if k[:4] in ('MALL', 'OMP_')])"
    with (
        started(["-c", code], tmp_path / "a", allocator="default allocator", threads=1) as a,
        started(["-c", code], tmp_path / "b", allocator="keeping allocator") as b,
    ):
        wait_for([a, b], seconds=60)
        assert a.out.strip() == "['1']"
        assert (
            b.out.strip() == f"{[*list(dict(sorted(ALLOCATORS['keeping allocator'].items())).values()), '2']}"
        )


def test_a_job_that_fails_tells_why_and_the_others_are_ended(tmp_path: Path):
    with (
        pytest.raises(SystemExit, match=r"bad ended with code 1(.|\n)*no such thing"),
        started(
            ["-c", "import time; time.sleep(60)"], tmp_path / "good", allocator="default allocator"
        ) as good,
        started(
            ["-c", "raise SystemExit('no such thing')"], tmp_path / "bad", allocator="default allocator"
        ) as bad,
    ):
        wait_for([good, bad], seconds=30)
    assert good.process.poll() is not None


def test_a_job_that_does_not_end_is_not_waited_for(tmp_path: Path):
    with (
        pytest.raises(SystemExit, match=r"slow: not done after 0\.1 s"),
        started(
            ["-c", "import time; time.sleep(60)"], tmp_path / "slow", allocator="default allocator"
        ) as slow,
    ):
        wait_for([slow], seconds=0.1)
    assert slow.process.poll() is not None
