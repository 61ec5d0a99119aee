# SPDX-License-Identifier: Apache-2.0
"""Pairs, labels and prompts that are written as messages, against transformers' own rendering."""

import gzip
import json
import logging

import pytest
from transformers import AutoTokenizer

from nemo_aligner.data.config import PairDataConfig, PromptDataConfig
from nemo_aligner.data.datasets import open_prompt_rows
from nemo_aligner.data.text_rows import open_pairs
from nemo_aligner.data.tokenizer import load_tokenizer
from nemo_aligner.errors import UserError
from tests.unit.data import test_row_dataset as row_tests
from tests.unit.data.conftest import CHATML

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "Where do camels keep water?"}
GOOD = {"role": "assistant", "content": "camels use the fat\n"}
BAD = {"role": "assistant", "content": "in their humps"}
SHAREGPT = {
    "conversations": [{"from": "human", "value": ASK["content"]}],
    "chosen": {"from": "gpt", "value": GOOD["content"]},
    "rejected": {"from": "gpt", "value": BAD["content"]},
}
PAIRS = [
    {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    {"prompt": ASK["content"], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    {"prompt": ASK["content"], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": [ASK], "chosen": GOOD["content"], "rejected": BAD["content"]},
    {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    SHAREGPT,
]


@pytest.fixture(scope="module")
def folder(make_hf):
    return make_hf(chat_template=CHATML, eos_token="<|im_end|>", adds_bos=True)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer("huggingface", folder)


@pytest.fixture(scope="module")
def render(folder):
    oracle = AutoTokenizer.from_pretrained(folder)

    def render(*messages, **options):
        text = oracle.apply_chat_template(list(messages), tokenize=False, **options)
        text = text if options else text.rstrip()
        return oracle.encode(text, add_special_tokens=False)

    return render


def prefix(path):
    return {"train": str(path), "validation": str(path)}


def comparisons(path, tokenizer):
    return row_tests.comparisons(prefix(path), tokenizer, max_length=400, append_eod=True)


@pytest.mark.parametrize("row", PAIRS)
def test_pairs_are_rendered_as_whole_conversations(jsonl, tokenizer, render, row, caplog):
    with caplog.at_level(logging.INFO):
        pairs = comparisons(jsonl(row, row), tokenizer)
    assert row_tests.tokens(pairs[1]) == [render(ASK, GOOD), render(ASK, BAD)]
    assert row_tests.tokens(pairs[1])[0][-1] == tokenizer.eos_id  # the end of the turn is EOS, once
    assert [record.getMessage().split(": ")[-1] for record in caplog.records] == [
        "read as conversations, laid out by the chat template"
    ]


def test_what_chosen_and_rejected_begin_with_is_the_prompt(jsonl, tokenizer, render):
    before = [SYSTEM, ASK, GOOD, ASK]
    pairs = comparisons(jsonl({"chosen": [*before, GOOD], "rejected": [*before, BAD]}), tokenizer)
    assert row_tests.tokens(pairs[0])[0] == render(*before, GOOD)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"chosen": [ASK, GOOD], "rejected": [SYSTEM, BAD]}, "begin differently, and there is no 'prompt'"),
        ({"chosen": [ASK, GOOD], "rejected": [ASK]}, "'rejected' ends where the other one goes on"),
        ({"chosen": [ASK, ASK], "rejected": [ASK, BAD]}, "'chosen' goes on with the role 'user'"),
        (
            {"prompt": "Why?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
            "'prompt' is not among the messages",
        ),
        ({"prompt": [ASK], "chosen": [ASK], "rejected": [BAD]}, "the last message has the role 'user'"),
        ({"prompt": [ASK], "chosen": [GOOD], "rejected": []}, "key 'rejected' has the value \\[\\]"),
        ({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD], "weight": 0}, "key 'weight' has the value 0"),
        ({"prompt": [ASK], "chosen": [GOOD]}, "no pair and no text"),
    ],
)
def test_bad_pairs_of_messages_name_their_line(jsonl, tokenizer, row, problem):
    path = jsonl(PAIRS[0], row)
    with pytest.raises(UserError, match=problem) as caught:
        open_pairs(path, tokenizer)
    assert caught.value.problem.startswith(f"{path}, line 2: ")


def test_messages_need_a_template(jsonl, bpe):
    with pytest.raises(
        UserError, match="line 1: the row has messages, and the tokenizer has no chat template"
    ):
        open_pairs(jsonl(PAIRS[0]), bpe)


def test_identical_pairs_are_left_out_and_counted(jsonl, tokenizer, caplog):
    same = {"prompt": [ASK], "chosen": [GOOD], "rejected": [GOOD]}
    with caplog.at_level(logging.INFO):
        pairs = comparisons(jsonl(PAIRS[0], same, PAIRS[1], same), tokenizer)
    assert (len(pairs), pairs.num_dropped) == (2, 2)
    assert (
        "2 of 4 pairs are of the same text twice, which has no training signal, and are left out"
        in caplog.text
    )
    with pytest.raises(UserError, match="of 1 pairs 1 are of the same text twice"):
        comparisons(jsonl(same), tokenizer)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [SYSTEM, ASK]},
        {"prompt": [SYSTEM, ASK]},
        {"system": SYSTEM["content"], "conversations": [{"from": "human", "value": ASK["content"]}]},
    ],
)
def test_prompts_end_with_the_generation_prompt(jsonl, tokenizer, render, row):
    data = PromptDataConfig(data_prefix=prefix(jsonl(row)))
    prompts = open_prompt_rows(data, data.splits.train, tokenizer, max_length=400)
    assert prompts[0].tokens == render(SYSTEM, ASK, add_generation_prompt=True)


def test_a_prompt_that_ends_with_the_response_is_refused(jsonl, tokenizer):
    data = PromptDataConfig(data_prefix=prefix(jsonl({"messages": [ASK, GOOD]})))
    with pytest.raises(UserError, match="line 1: the last message is the assistant's"):
        open_prompt_rows(data, data.splits.train, tokenizer, max_length=400)


def test_labels_of_messages(tmp_path, tokenizer, render):
    path = tmp_path / "rows.json.gz"
    path.write_bytes(gzip.compress(json.dumps([{"messages": [ASK, GOOD], "label": [1, 2]}] * 2).encode()))
    data = PairDataConfig(data_prefix=prefix(path), append_eod=True)
    rows = row_tests.labeled_rows(data, tokenizer, max_length=400, num_attributes=2)
    assert (len(rows), rows[1].tokens) == (2, render(ASK, GOOD))
    assert rows[1].labels == ((1.0, 2.0),)


def test_conversations_that_differ_earlier_are_compared_by_rewards_alone(jsonl, tokenizer, render):
    row = {"prompt": [ASK], "chosen": [GOOD, ASK, GOOD], "rejected": [BAD, ASK, BAD]}
    pairs = comparisons(jsonl(row), tokenizer)
    assert row_tests.tokens(pairs[0]) == [render(ASK, GOOD, ASK, GOOD), render(ASK, BAD, ASK, BAD)]
    with pytest.raises(UserError, match="line 1: the conversations of 'chosen' and 'rejected' differ before"):
        row_tests.comparisons(prefix(jsonl(row)), tokenizer, max_length=400, append_eod=True, generates=True)


def test_a_generated_response_ends_with_its_turn(jsonl, tokenizer, render):
    rows = row_tests.comparisons(
        prefix(jsonl(PAIRS[0])), tokenizer, max_length=400, append_eod=True, generates=True
    )
    asked = render(ASK, add_generation_prompt=True)
    for sequence, response in zip(rows[0].sequences, (GOOD, BAD), strict=True):
        assert sequence.tokens == render(ASK, response)
        assert sequence.loss_mask == [False] * len(asked) + [True] * (len(sequence.tokens) - len(asked))
