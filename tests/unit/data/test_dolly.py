# SPDX-License-Identifier: Apache-2.0
"""Dolly rows: the preparation script, and raw rows given to the trainer."""

import gzip
import hashlib
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_aligner.data.config import SFTDataConfig, SFTSplitConfig
from nemo_aligner.data.datasets import open_sft
from nemo_aligner.data.dolly import dolly_to_prompt_response
from nemo_aligner.errors import UserError

SCRIPT = Path(__file__).parents[3] / "examples/nlp/data/dolly/preprocess.py"
ROWS = [
    {
        "instruction": f"Question {i}?",
        "context": f"Context {i}. é" if i % 4 else "",
        "response": f" Response {i} ",
        "category": "qa",
    }
    for i in range(40)
]


def preprocess(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def raw(jsonl):
    return jsonl(*ROWS, name="databricks-dolly-15k.jsonl")


def test_the_order_is_chosen_by_a_hash_of_the_row():
    firsts = []
    for row in ROWS:
        converted = dolly_to_prompt_response(row)
        assert converted["output"] == row["response"]
        assert converted["category"] == "qa"
        if not row["context"]:
            assert converted["input"] == row["instruction"]
            continue
        text = json.dumps([row["instruction"], row["context"], row["response"]])
        context_first = hashlib.sha256(text.encode()).digest()[0] % 2 == 1
        parts = (
            [row["context"], row["instruction"]] if context_first else [row["instruction"], row["context"]]
        )
        assert converted["input"] == "\n\n".join(parts)
        firsts.append(context_first)
    assert 5 < sum(firsts) < 25


def test_the_script_writes_beside_its_input(raw):
    done = preprocess("--input", raw)
    assert done.returncode == 0, done.stderr
    output = raw.with_name("databricks-dolly-15k-output.jsonl")
    assert done.stdout == f"wrote 40 rows to {output}\n"
    assert [json.loads(line) for line in output.read_text().splitlines()] == list(
        map(dolly_to_prompt_response, ROWS)
    )
    assert sorted(raw.parent.iterdir()) == sorted([raw, output])


def test_the_script_never_overwrites_unasked(raw):
    output = raw.with_name("databricks-dolly-15k-output.jsonl")
    output.write_text("precious")
    refused = preprocess("--input", raw, "--dataset-impl", "text")
    assert refused.returncode == 2
    assert f"{output} exists\nFix: add --overwrite" in refused.stderr
    assert output.read_text() == "precious"
    assert preprocess("--input", raw, "--overwrite").returncode == 0
    assert len(output.read_text().splitlines()) == 40


def test_the_script_reads_compressed_rows_and_takes_a_name(raw, tmp_path):
    packed = tmp_path / "dolly.jsonl.gz"
    packed.write_bytes(gzip.compress(raw.read_bytes()))
    assert preprocess("--input", packed, "--output", tmp_path / "named.jsonl").returncode == 0
    assert preprocess("--input", packed).returncode == 0
    assert (tmp_path / "named.jsonl").read_bytes() == (tmp_path / "dolly-output.jsonl").read_bytes()


@pytest.mark.parametrize("line", ['{"instruction": "a"}', '{"instruction": "a", "response": 1}', "{broken"])
def test_the_script_stops_at_a_bad_line_and_leaves_nothing(jsonl, line):
    source = jsonl(ROWS[0], line)
    done = preprocess("--input", source)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {source}, line 2: ")
    assert "Traceback" not in done.stderr
    assert list(source.parent.iterdir()) == [source]


@pytest.mark.parametrize(
    ("arguments", "status"),
    [([], 2), (["--input", "absent.jsonl"], 2), (["--input", "x", "--dataset-impl", "mmap"], 2)],
)
def test_the_script_refuses(arguments, status):
    done = preprocess(*arguments)
    assert done.returncode == status
    assert done.stderr
    assert "Traceback" not in done.stderr


def samples(path, tokenizer):
    split = SFTSplitConfig(file_path=str(path))
    data = SFTDataConfig(train_ds=split, validation_ds=split)
    dataset = open_sft(data, split, tokenizer, answer_only_loss=True)
    return [dataset[i] for i in range(len(dataset))]


def test_raw_rows_give_the_samples_of_the_prepared_file(raw, bpe, caplog):
    assert preprocess("--input", raw).returncode == 0
    with caplog.at_level(logging.INFO):
        of_raw = samples(raw, bpe)
    assert [record.getMessage() for record in caplog.records] == [
        f"{raw} holds raw Dolly rows: read as examples/nlp/data/dolly/preprocess.py converts them"
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        of_prepared = samples(raw.with_name("databricks-dolly-15k-output.jsonl"), bpe)
    assert of_raw == of_prepared
    assert not caplog.records


def test_a_template_may_name_dollys_own_fields(raw, bpe):
    split = SFTSplitConfig(
        file_path=str(raw),
        prompt_template="{instruction}|{response}",
        label_key="response",
        truncation_field="instruction",
    )
    data = SFTDataConfig(train_ds=split, validation_ds=split)
    sample = open_sft(data, split, bpe, answer_only_loss=True)[0]
    assert bpe.decode(sample.tokens) == "Question 0?|Response 0</s>"


def test_raw_rows_with_bad_fields_are_refused(jsonl, bpe):
    path = jsonl({**ROWS[0], "context": 5})
    with pytest.raises(UserError, match=r"line 1: key 'context' has the value 5"):
        samples(path, bpe)
