# SPDX-License-Identifier: Apache-2.0
"""data_prefix: each form that it may have, and what is said of any other."""

import pytest

from nemo_aligner.data.data_spec import DataSpec, Split, parse_data_spec
from nemo_aligner.errors import UserError


@pytest.mark.parametrize(
    ("value", "split"),
    [
        ("a.jsonl", Split(paths=("a.jsonl",))),
        (["a.jsonl"], Split(paths=("a.jsonl",))),
        (["a", "b"], Split(paths=("a", "b"))),
        (["b", "b"], Split(paths=("b", "b"))),
        ([3, "a", 1, "b"], Split(paths=("a", "b"), weights=(0.75, 0.25))),
        ([0.25, "a", "0.75", "b"], Split(paths=("a", "b"), weights=(0.25, 0.75))),
        (["1.", "a"], Split(paths=("a",), weights=(1.0,))),
        (["1e-1", "a", ".3", "b"], Split(paths=("a", "b"), weights=(0.1 / 0.4, 0.3 / 0.4))),
        (("2024.jsonl", "7.jsonl"), Split(paths=("2024.jsonl", "7.jsonl"))),
    ],
)
def test_forms_of_a_split(value, split):
    found = parse_data_spec({"train": value, "validation": ["v"]}, None)
    assert found == DataSpec(train=split, validation=Split(paths=("v",)), test=None, extra_validation={})


def test_the_tutorials_form():
    files = {"train": ["t.jsonl"], "validation": ["v.jsonl"], "test": ["v.jsonl"]}
    found = parse_data_spec(files, None)
    assert (found.train, found.validation, found.test) == tuple(
        Split(paths=(name,)) for name in ("t.jsonl", "v.jsonl", "v.jsonl")
    )
    assert found.paths == ("t.jsonl", "v.jsonl")


def test_more_validation_sets():
    found = parse_data_spec(
        {"train": "t", "validation": "v", "validation_math": [1, "m", 1, "n"], "validation2": "w"}, None
    )
    assert list(found.extra_validation) == ["validation_math", "validation2"]
    assert found.extra_validation["validation_math"].weights == (0.5, 0.5)
    assert found.paths == ("t", "v", "m", "n", "w")


@pytest.mark.parametrize(
    ("shares", "num_rows", "expected"),
    [
        ("98,1,1", 100, [98, 1, 1]),
        ("98, 1, 1", 1000, [980, 10, 10]),
        ("8/1/1", 10, [8, 1, 1]),
        ("900,50,50", 100, [90, 5, 5]),
        ("1,1", 7, [4, 3, None]),
        ("1,1,0", 6, [3, 3, None]),
        ("0.9,0.05,0.05", 20, [18, 1, 1]),
        ("98,1,1", 3, [3, 0, 0]),
    ],
)
def test_one_list_is_cut_into_splits(shares, num_rows, expected):
    found = parse_data_spec(["a", "b"], shares)
    splits = [found.train, found.validation, found.test]
    ranges = [split and split.rows(num_rows) for split in splits]
    assert [rows if rows is None else len(rows) for rows in ranges] == expected
    assert [row for rows in ranges if rows for row in rows] == list(range(num_rows))
    assert all(split is None or split.paths == ("a", "b") for split in splits)


@pytest.mark.parametrize("num_rows", [1, 10, 997, 123_457])
def test_splits_neither_overlap_nor_leave_rows_out(num_rows):
    found = parse_data_spec("a", "97,2,1")
    assert found.test is not None
    rows = [split.rows(num_rows) for split in (found.train, found.validation, found.test)]
    assert rows[0].start == 0
    assert rows[0].stop == rows[1].start
    assert rows[1].stop == rows[2].start
    assert rows[2].stop == num_rows


@pytest.mark.parametrize(
    ("value", "shares", "problem", "fix"),
    [
        (None, None, "is not set", "train: [train.jsonl]"),
        (["a"], None, "names files for all splits", "splits_string"),
        ({"train": "a", "validation": "b"}, "98,1,1", "splits_string='98,1,1' cuts files", "=null"),
        ({"test": "a"}, None, "no 'train'; it has \\['test'\\]", "train"),
        ({"validation": "a", "test": "b"}, None, "no 'train'", "train"),
        ({"train": None, "validation": "b"}, None, "no 'train'", "train"),
        ({"train": "a", "val": "b"}, None, "has the key 'val'", "use validation"),
        ({"train": "a", "validation": "b", "tset": "c"}, None, "has the key 'tset'", "use test"),
        ({"train": [], "validation": "b"}, None, "data_prefix.train is an empty list", "at least one"),
        ({"train": ["a", 0.3], "validation": "b"}, None, "entry 2 of .*train is 0.3", "weight before each"),
        ({"train": [0.3, "a", "b"], "validation": "v"}, None, "entry 3 .* is 'b', where a weight", "before"),
        ({"train": [0.3, 0.7, "a"], "validation": "v"}, None, "entry 2 .* is 0.7, where a path", "paths"),
        ({"train": [0.3, "a", 0.7], "validation": "v"}, None, "ends with the weight 0.7", "file"),
        ({"train": [0, "a"], "validation": "v"}, None, "entry 1 .* is the weight 0", "leave its file out"),
        ({"train": [-1, "a"], "validation": "v"}, None, "is the weight -1", "above 0"),
        ({"train": [10**400, "a"], "validation": "v"}, None, "entry 1 .* is 10+, where a path", "before"),
        ({"train": [1e308, "a", 1e308, "b"], "validation": "v"}, None, "more than any number", "smaller"),
        ({"train": "a", "validation": [["b"]]}, None, "entry 1 of .*validation is \\['b'\\]", "paths"),
        ({"train": "a", "validation": True}, None, "entry 1 of .*validation is True", "paths"),
        ({"train": "a", "validation": ""}, None, "entry 1 of .*validation is ''", "paths"),
        (["a"], "98", "splits_string='98' is not two or three numbers", "98,1,1"),
        (["a"], "1e999,1,1", "is not two or three numbers", "98,1,1"),
        (["a"], "98,one,1", "'98,one,1' is not two or three numbers", "98,1,1"),
        (["a"], "98,-1,1", "'98,-1,1' is not two or three numbers", "98,1,1"),
        (["a"], "99,0,1", "leaves nothing for validation", "98,1,1"),
        (["a"], "0,99,1", "leaves nothing for train", "98,1,1"),
    ],
)
def test_other_forms_are_refused_by_place_and_value(value, shares, problem, fix):
    with pytest.raises(UserError, match=problem) as caught:
        parse_data_spec(value, shares)
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("rows", "share", "expected"), [(100, 0.1, 90), (3, 0.1, 2), (3, "0.9", 1), (2, 0.5, 1)]
)
def test_validation_may_be_a_share_of_the_training_rows(rows: int, share: object, expected: int):
    found = parse_data_spec({"train": ["a", "b"], "validation": share}, None)
    assert found.validation
    assert found.train.rows(rows) == range(expected)
    assert found.validation.rows(rows) == range(expected, rows)
    assert found.train.paths == found.validation.paths == ("a", "b")


def test_a_share_of_one_row_is_refused_by_its_setting():
    found = parse_data_spec({"train": "a", "validation": 0.1}, None)
    assert found.validation
    assert found.train.rows_of("a", 1, unit="pairs") == range(1)
    with pytest.raises(
        UserError, match=r"data_prefix.validation=0.1 leaves none of the 1 pairs of a for a split"
    ):
        found.validation.rows_of("a", 1, unit="pairs")
