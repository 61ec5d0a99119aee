# SPDX-License-Identifier: Apache-2.0
"""What a benchmark found comes back from JSON as it was, and stands on the page where it belongs."""

from pathlib import Path

import pytest

from benchmarks.figures import Figure, Part, load, page, ratio, store


def figure(subject: str, metric: str, *values: float) -> Figure:
    return Figure(table="Speed", subject=subject, metric=metric, values=values)


PART = Part(
    title="A part",
    about="What was measured.\n",
    conditions={"processor": "one"},
    figures=(figure("ours", "tokens/s", 2.0, 4.0, 3.0), figure("theirs", "tokens/s", 1.0, 1.0, 2.0)),
)


def test_a_ratio_is_taken_within_each_repeat():
    top, bottom = PART.figures
    found = ratio("Ratios", "ours / theirs", top, bottom)
    assert found.values == (2.0, 4.0, 1.5)
    assert found.median == 2.0


def test_a_ratio_of_two_metrics_is_refused():
    with pytest.raises(AssertionError):
        ratio("Ratios", "x", PART.figures[0], figure("theirs", "seconds", 1.0, 1.0, 1.0))


def test_parts_come_back_and_stay_beside_each_other(tmp_path: Path):
    path = tmp_path / "results.json"
    store(path, "one", PART)
    assert store(path, "two", PART) == load(path) == {"one": PART, "two": PART}


def test_the_page_has_a_row_for_each_subject():
    written = page({"one": PART}, ["none", "one"])
    assert "## A part" in written
    assert "| ours | 3.00 (2.00 to 4.00) |" in written
    assert "| theirs | 1.00 (1.00 to 2.00) |" in written
