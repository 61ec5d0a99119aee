# SPDX-License-Identifier: Apache-2.0
"""Records survive any text in them, and damage costs the damaged line."""

import json
from pathlib import Path

import pytest

from nemo_aligner.run.experiment import Experiment, ExperimentConfig
from nemo_aligner.run.records import record, rewind

# Everything that some tool takes for the end of a line.
SEPARATORS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_bytes().split(b"\n") if line]


@pytest.mark.parametrize("text", [SEPARATORS, "naïve 你好 \U0001f600", "\x00", "\ud83d"], ids=ascii)
def test_any_text_is_one_line_for_every_reader(tmp_path: Path, text: str):
    config = ExperimentConfig(create_tensorboard_logger=False)
    with Experiment(config, tmp_path, writes=True) as run:
        run.begin(0)
        for step in (1, 2, 3):
            run.log_rows("t", [{"prompt": text, "reward": 0.5}], step=step)
        run.begin(2)
    path = tmp_path / "table_t.jsonl"
    assert steps(path) == [1, 2]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == [text, text]


def test_a_file_with_raw_separators_is_rewound(tmp_path: Path):
    path = tmp_path / "table_t.jsonl"
    lines = [json.dumps({"step": n, "text": SEPARATORS}, ensure_ascii=False) + "\n" for n in range(4)]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
    rewind(path, 2)
    assert path.read_bytes() == "".join(lines[:3]).encode()


@pytest.mark.parametrize(
    "bad",
    [
        b"{",
        b"\x00" * 4096,
        b"\xff\xfe",
        b"[1]",
        b'{"loss": 1}',
        b'{"step": "3"}',
        b'{"step": true}',
        b'{"step": 1.5}',
        b"[" * 100_000,
        b'{"step": ' + b"9" * 5000 + b"}",
        b"",
    ],
    ids=lambda bad: ascii(bad[:12]),
)
def test_damage_costs_the_damaged_line(tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: bytes):
    path = tmp_path / "metrics.jsonl"
    good = [record({"step": n}).encode() for n in range(1, 6)]
    path.write_bytes(b"".join([*good[:2], bad + b"\n", *good[2:]]))
    rewind(path, 4)
    assert path.read_bytes() == b"".join(good[:4])
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == bad + b"\n"
    assert "metrics.jsonl: 1 line(s) are no records (line 3)" in caplog.text


def test_a_last_line_that_was_begun_goes(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    rewind(path, 9)
    assert path.read_bytes() == b'{"step": 1}\n'
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_what_would_be_left_empty_is_moved_aside(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    for n in (1, 2):
        path.write_bytes(b'{"step": 5}\n')
        rewind(path, 0)
        assert not path.exists()
        assert (tmp_path / f"metrics.{n}.jsonl").read_bytes() == b'{"step": 5}\n'
