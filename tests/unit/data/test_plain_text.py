# SPDX-License-Identifier: Apache-2.0
"""Plain text end to end: each token is predicted once, whatever the rows; documents and their places."""

import itertools
import logging

import pytest

from nemo_aligner.data.plain_text import PlainTextDataset, open_text
from nemo_aligner.data.row import TextEncoder
from nemo_aligner.data.tokenizer import load_tokenizer
from nemo_aligner.errors import UserError

TEXTS = ["camels use the fat", "in their humps", "a third one that is longer than the others"]


@pytest.fixture(scope="module")
def encode(make_hf):
    tokenizer = load_tokenizer("huggingface", make_hf())
    return TextEncoder(tokenizer=tokenizer, add_bos=False, append_eos=True)


@pytest.mark.parametrize("form", ["txt", "jsonl"])
@pytest.mark.parametrize("length", [2, 5, 7, 1000])
def test_every_token_is_predicted_once(jsonl, tmp_path, encode, form, length):
    path = jsonl(*({"text": text} for text in TEXTS))
    if form == "txt":
        path = tmp_path / "texts.txt"
        path.write_text("\n<|endoftext|>\n".join(TEXTS) + "\n<|endoftext|>\n")
    whole = [token for text in TEXTS for token in encode(text)]
    dataset = PlainTextDataset(open_text(path), encode, max_seq_length=length)
    rows = [dataset[index] for index in range(len(dataset))]
    predicted = [t for row in rows for t, m in zip(row.tokens, row.sequences[0].loss_mask, strict=True) if m]
    assert predicted == whole[1:]
    assert all(2 <= len(row.tokens) <= length for row in rows)
    assert all(row.tokens[-1] == after.tokens[0] for row, after in itertools.pairwise(rows))


def test_documents_are_named_by_line(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("one\ntwo\n<|endoftext|>\n\nthree\n<|endoftext|>\n\n")
    texts = open_text(path)
    assert [texts[i] for i in range(len(texts))] == ["one\ntwo", "three"]
    assert texts.where(0).endswith("texts.txt, line 1")
    assert texts.where(1).endswith("texts.txt, line 5")


@pytest.mark.parametrize(
    ("content", "problem"), [(b"\n \n", "holds no text"), (b"\xe9t\xe9", "is not in UTF-8")]
)
def test_bad_files_are_refused(tmp_path, content, problem):
    path = tmp_path / "texts.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=problem):
        open_text(path)


def test_a_part_of_the_documents(jsonl, encode):
    texts = open_text(jsonl(*({"text": text} for text in TEXTS)))
    part = PlainTextDataset(texts, encode, max_seq_length=1000, within=range(1, 3))
    assert part[0].tokens == [*encode(TEXTS[1]), *encode(TEXTS[2])]
    assert part.fingerprint != PlainTextDataset(texts, encode, max_seq_length=1000).fingerprint


def test_documents_that_are_not_learned_are_left_out_and_counted(jsonl, encode, caplog):
    path = jsonl({"text": TEXTS[0]}, {"text": TEXTS[1], "weight": 0}, {"text": TEXTS[2], "train": True})
    with caplog.at_level(logging.INFO):
        dataset = PlainTextDataset(open_text(path), encode, max_seq_length=1000)
    assert dataset[0].tokens == [*encode(TEXTS[0]), *encode(TEXTS[2])]
    assert dataset.num_dropped == 1
    assert "1 of 3 documents say that they are not learned" in caplog.text


def test_rows_without_a_text_are_refused(jsonl):
    with pytest.raises(UserError, match="line 2: key 'text' is missing"):
        open_text(jsonl({"text": "a"}, {"input": "b"}))
