# SPDX-License-Identifier: Apache-2.0
"""Ranks with more work than others are waited for however long they take; one that failed or died is told."""

import subprocess
import sys

import meeting_worker
import pytest
from meeting_worker import RANKS


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, str]]:
    """By case, what each rank had to tell that lived to tell it."""
    out = tmp_path_factory.mktemp("meeting")
    log = out / "log.txt"
    with log.open("wb") as stream:
        subprocess.run(
            [sys.executable, meeting_worker.__file__, out],
            stdout=stream,
            stderr=stream,
            timeout=200,
            check=False,
        )
    sys.stdout.write(log.read_text())
    return {
        case: {n: path.read_text() for n in range(RANKS) if (path := out / case / f"rank{n}").exists()}
        for case in meeting_worker.CASES
    }


@pytest.mark.parametrize("case", ["busy", "late", "nested"])
def test_all_meet_after_the_slowest(told: dict[str, dict[int, str]], case: str):
    """With a time-out of 4 s, one rank takes 10 s and another 3; or meetings follow each other, or are nested."""
    assert told[case] == dict.fromkeys(range(RANKS), "met")


def test_a_rank_that_fails_is_reported_to_those_that_wait(told: dict[str, dict[int, str]]):
    assert told["fails"] == {0: "rank 1 failed", 1: "no room on the disk", 2: "rank 1 failed"}


def test_a_rank_that_died_is_reported(told: dict[str, dict[int, str]]):
    lost = "rank 1 gave no sign of life for 4 s"
    assert told["dies"] == {0: lost, 2: lost}


def test_the_rank_that_the_others_met_by_died(told: dict[str, dict[int, str]]):
    gone = "the rank that holds the store of all is gone"
    assert told["store-dies"] == {1: gone, 2: gone}
