# SPDX-License-Identifier: Apache-2.0
"""Data files of every kind, damaged: each is read, or refused by a UserError, in bounded time and memory."""

import gzip
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nemo_aligner.data.config import PairDataConfig, PromptDataConfig, SFTDataConfig, SFTSplitConfig
from nemo_aligner.data.datasets import open_prompt_rows, open_response_rows, open_sft
from nemo_aligner.data.requests import open_requests, tokens_of
from nemo_aligner.data.text_rows import Labels, ResponseFiles, open_labeled, open_pairs
from nemo_aligner.data.tokenizer import Tokenizer, load_tokenizer
from tests.fuzz.guard import run
from tests.fuzz.mutate import bend, spell, twist
from tests.unit.checkpoint.conftest import build_tokenizer

CHATML = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
ASK, SAY = {"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}
OTHER = {"role": "assistant", "content": "four"}
LABEL = [1, -100, 0.5]
# A row, and the kinds of reader that take it.
ROWS = (
    ({"input": "one two", "output": "three", "category": "x"}, "sft"),
    ({"prompt": "one two", "completion": "three", "id": 7}, "sft"),
    ({"prompt": "one two", "response": "three"}, "sft"),
    ({"instruction": "count", "input": "one two", "output": "three"}, "sft"),
    ({"instruction": "count", "context": "", "response": "three", "category": "qa"}, "sft"),
    ({"question": "one two", "answer": "three"}, "sft"),
    ({"text": "one two three"}, "prompts requests"),
    ({"prompt": "one two three"}, "prompts requests"),
    ({"messages": [{"role": "system", "content": "be brief"}, ASK]}, "prompts requests"),
    ({"messages": [ASK, SAY, ASK, SAY], "tools": None}, "chat markers"),
    ({"system": "", "mask": "User", "type": "VALUE_TO_TEXT", "conversations": [
        {"from": "User", "value": "one", "label": None},
        {"from": "Assistant", "value": "two", "label": "quality:4"}]}, "markers"),
    ({"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]}, "chat markers"),
    ({"text": "one two"}, "pairs"),
    ({"prompt": "one two", "chosen": " three", "rejected": " one"}, "pairs"),
    ({"prompt": [ASK], "chosen": [SAY], "rejected": [OTHER]}, "pairs"),
    ({"chosen": [ASK, SAY], "rejected": [ASK, OTHER], "prompt": "one two"}, "pairs"),
    ({"conversations": [{"from": "human", "value": "one"}], "chosen": {"from": "gpt", "value": "two"},
      "rejected": {"from": "gpt", "value": "three"}}, "pairs"),
    ({"text": "one two", "label": LABEL}, "labels label_pairs"),
    ({"messages": [ASK, SAY], "label": LABEL}, "labels label_pairs"),
)  # fmt: skip
KINDS = ("sft", "chat", "markers", "pairs", "labels", "label_pairs", "prompts", "requests")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    fast = build_tokenizer()
    fast.chat_template = CHATML
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return load_tokenizer("huggingface", folder)


def _reader(draw: random.Random, folder: Path, tokenizer: Tokenizer) -> Callable[[], object]:
    """Writes a file of one kind of row, with one row or the whole file damaged; returns what reads it."""
    row, kinds = draw.choice(ROWS)
    rows = [spell(draw, row) for _ in range(draw.choice((0, 1, 2, 3)))]
    rows.insert(draw.randrange(len(rows) + 1), spell(draw, twist(draw, row)))
    if draw.random() < 0.2:
        content = b"[" + b",\n".join(rows) + b"]"
    else:
        content = b"\n".join(rows) + draw.choice((b"", b"\n", b"\r\n"))
    if draw.random() < 0.3:
        content = bend(draw, content)
    if draw.random() < 0.1:
        content = gzip.compress(content)
        content = bend(draw, content) if draw.random() < 0.5 else content
    path = folder / draw.choice(("rows.jsonl", "rows.json", "rows.jsonl.gz"))
    path.write_bytes(content)
    kind = draw.choice(kinds.split() if draw.random() < 0.85 else KINDS)
    opened = _opened(draw, kind, str(path), tokenizer)

    def read() -> None:
        rows = opened()
        for index in range(len(rows)):
            rows[index]

    return read


def _opened(draw: random.Random, kind: str, file: str, tokenizer: Tokenizer) -> Callable[[], Any]:
    length = draw.choice((8, 64, 512))
    split = SFTSplitConfig(file_path=file, max_seq_length=length)
    chat_template = "tokenizer" if kind == "chat" else "prompt_tokens"
    sft = SFTDataConfig(train_ds=split, validation_ds=split, chat=kind != "sft", chat_template=chat_template)
    prefix = {"train": file, "validation": file}
    pairs = PairDataConfig(data_prefix=prefix, append_eod=draw.random() < 0.5)
    prompts, train = PromptDataConfig(data_prefix=prefix), pairs.splits.train
    labels = Labels(num_attributes=3, missing=-100.0, paired=kind == "label_pairs")
    sizes = {"max_length": length, "generates": draw.random() < 0.5}
    match kind:
        case "pairs":
            files = ResponseFiles(open=open_pairs, unit="rows")
            return lambda: open_response_rows(pairs, train, tokenizer, files=files, **sizes)
        case "labels" | "label_pairs":
            files = ResponseFiles(open=partial(open_labeled, labels=labels), unit="rows")
            return lambda: open_response_rows(pairs, train, tokenizer, files=files, **sizes)
        case "prompts":
            return lambda: open_prompt_rows(prompts, train, tokenizer, max_length=length)
        case "requests":
            return lambda: [tokens_of(request.prompt, tokenizer) for request in open_requests(file)]
    return lambda: open_sft(sft, split, tokenizer, answer_only_loss=True)


def _check(tokenizer: Tokenizer, seeds: range) -> None:
    ends = run(lambda draw, folder: _reader(draw, folder, tokenizer), [f"rows {seed}" for seed in seeds])
    assert ends["read"] > 0.05 * len(seeds)
    assert ends["refused"] > 0.2 * len(seeds)


def test_rows(tokenizer: Tokenizer):
    _check(tokenizer, range(700))


@pytest.mark.fuzz
@pytest.mark.parametrize("part", range(7))
def test_many_rows(tokenizer: Tokenizer, part: int):
    _check(tokenizer, range(700 + 900 * part, 700 + 900 * (part + 1)))
