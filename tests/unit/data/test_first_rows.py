# SPDX-License-Identifier: Apache-2.0
"""The first rows of a file are refused early if, and only if, training would refuse them."""

import gzip
import json
from pathlib import Path

import pytest

from nemo_aligner.data.config import SFTDataConfig, SFTSplitConfig
from nemo_aligner.data.first_rows import FIRST_ROWS, check_pair_rows, check_prompt_rows, check_sft_rows
from nemo_aligner.errors import UserError

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
GOOD = {"input": "a", "output": "b"}


def check(path: Path, *rows: object, chat: bool = False, **changed: str) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = SFTSplitConfig(file_path=str(path), **changed)
    check_sft_rows(SFTDataConfig(train_ds=split, chat=chat), split)


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {**GOOD, "weight": 0},
        {"prompt": "a", "completion": "b"},
        {"instruction": "a", "input": "", "output": "b"},
        {"instruction": "a", "context": "", "response": "b", "category": "open_qa"},
    ],
)
def test_rows_that_training_reads_pass(tmp_path: Path, row: dict):
    check(tmp_path / "rows.jsonl", row)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        GOOD,
    ],
)
def test_conversations_that_training_reads_pass(tmp_path: Path, row: dict):
    check(tmp_path / "rows.jsonl", row, chat=True)


def test_a_bad_row_is_reported_with_its_line(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(UserError, match=rf"{path}, line 2: key 'output' is missing"):
        check(path, GOOD, {"input": "a"})
    with pytest.raises(UserError, match="does not end with"):
        check(path, GOOD, prompt_template="{output} {input}")
    with pytest.raises(UserError, match=r"line 1"):
        check(path, {"x": 1}, chat=True)


def test_later_rows_and_packed_files_are_left_to_training(tmp_path: Path):
    check(tmp_path / "rows.jsonl", *[GOOD] * FIRST_ROWS, {"x": 1})
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b"no row"))
    split = SFTSplitConfig(file_path=str(tmp_path / "rows.jsonl.gz"))
    check_sft_rows(SFTDataConfig(train_ds=split), split)


def test_pairs_and_prompts(tmp_path: Path):
    def written(row: object) -> str:
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        return str(tmp_path / "rows.jsonl")

    check_pair_rows(written({"prompt": "a", "chosen": "b", "rejected": "c"}))
    check_pair_rows(written({"chosen": TURNS, "rejected": TURNS}))
    check_pair_rows(written({"text": "a"}))
    check_prompt_rows(written({"text": "a"}))
    check_prompt_rows(written({"messages": TURNS[:1]}))
    with pytest.raises(UserError, match=r"line 1: .*no pair"):
        check_pair_rows(written({"better": "b"}))
    with pytest.raises(UserError, match="line 1"):
        check_prompt_rows(written({"question_": "b"}))
