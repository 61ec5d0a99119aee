# SPDX-License-Identifier: Apache-2.0
"""Data sets from files: which layout is chosen, and where errors are said to be."""

import logging
from dataclasses import replace

import pytest

from nemo_aligner.data.config import ChatPromptTokens, SFTDataConfig, SFTSplitConfig, ValidationSplitConfig
from nemo_aligner.data.datasets import open_sft
from nemo_aligner.data.row import describe
from nemo_aligner.data.tokenizer import load_tokenizer
from nemo_aligner.errors import UserError

MESSAGES = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def opened(path, tokenizer, *, answer_only_loss=True, split=None, **settings):
    split = SFTSplitConfig(file_path=str(path), **(split or {}))
    data = SFTDataConfig(train_ds=split, validation_ds=split, **settings)
    return open_sft(data, split, tokenizer, answer_only_loss=answer_only_loss)


def test_prompt_and_response(jsonl, bpe):
    dataset = opened(jsonl({"input": "a", "output": "b"}, {"input": "c", "output": "d"}), bpe)
    assert [describe(dataset[i], bpe) for i in range(len(dataset))] == ["a⟦ b</s>⟧", "c⟦ d</s>⟧"]


@pytest.mark.parametrize("plain_text", [False, True])
def test_several_files_are_a_blend(jsonl, bpe, plain_text):
    """File after file, each with its share of an epoch; a validation share is cut off each."""
    row = (lambda text: {"text": text}) if plain_text else (lambda text: {"input": text, "output": text})
    first = str(jsonl(*(row(f"a{i}") for i in range(4)), name="a.jsonl"))
    second = str(jsonl(*(row(f"b{i}") for i in range(2)), name="b.jsonl"))
    split = SFTSplitConfig(file_path=(1, first, 3, second))
    data = SFTDataConfig(
        train_ds=split, validation_ds=ValidationSplitConfig(file_path="0.5"), plain_text=plain_text
    )
    for part, letters in (
        (split, ("a0", "a1", "b0")),
        (data.validation["validation_ds"], ("a2", "a3", "b1")),
    ):
        blended = open_sft(data, part, bpe, answer_only_loss=True)
        # What validates is read once, whatever it weighs in training.
        assert [share.weight for share in blended.blend] == ([0.25, 0.75] if part is split else [])
        shown = "".join(bpe.decode(blended[i].tokens) for i in range(len(blended)))
        found = [shown.find(text) for text in letters]
        assert min(found) >= 0
        assert found == sorted(found)
        alone = [
            open_sft(data, replace(part, file_path=path), bpe, answer_only_loss=True).fingerprint
            for path in (first, second)
        ]
        assert blended.fingerprint["rows"] == [one["rows"] for one in alone]


def test_a_blend_without_a_file_is_refused(jsonl, bpe):
    split = SFTSplitConfig(file_path=(1, str(jsonl({"input": "a", "output": "b"})), 2))
    data = SFTDataConfig(train_ds=split, validation_ds=split)
    with pytest.raises(UserError, match=r"model.data.train_ds.file_path ends with"):
        open_sft(data, split, bpe, answer_only_loss=True)


def test_a_share_of_one_row_is_refused(jsonl, bpe):
    path = str(jsonl({"input": "a", "output": "b"}))
    share = ValidationSplitConfig(file_path="0.1")
    data = SFTDataConfig(train_ds=SFTSplitConfig(file_path=path), validation_ds=share)
    assert len(open_sft(data, data.train_ds, bpe, answer_only_loss=True)) == 1
    with pytest.raises(UserError, match=r"validation_ds.file_path=0.1 leaves none of the 1 rows of"):
        open_sft(data, replace(share, file_path=path), bpe, answer_only_loss=True)


@pytest.mark.parametrize(
    ("chat_template", "shown"),
    [
        ("tokenizer", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello<|im_end|>⟧"),
        ("prompt_tokens", "<extra_id_0>System\n\n|User\nHi\n|Assistant\n⟦Hello\n|<|im_end|>⟧"),
    ],
)
def test_conversations(jsonl, chatml, chat_template, shown):
    tokens = ChatPromptTokens(system_turn_start="<extra_id_0>", turn_start="|")
    dataset = opened(
        jsonl(MESSAGES), chatml, chat=True, chat_template=chat_template, chat_prompt_tokens=tokens
    )
    assert describe(dataset[0], chatml) == shown


def test_conversations_given_as_prompt_and_response_name_the_setting(jsonl, bpe):
    with pytest.raises(UserError, match="line 1: the row is a conversation") as caught:
        opened(jsonl(MESSAGES), bpe)
    assert "model.data.chat=True" in caught.value.fix
    assert len(opened(jsonl(MESSAGES | {"input": "a", "output": "b"}), bpe)) == 1
    with pytest.raises(UserError, match="line 1: key 'conversations' is missing") as caught:
        opened(jsonl({"txt": "a"}), bpe, chat=True)
    assert "model.data.chat=False" in caught.value.fix


@pytest.mark.parametrize(
    "row",
    [
        {"input": "Hi", "output": "Hello"},
        {"prompt": "Hi", "completion": "Hello", "weight": 1},
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"prompt": [MESSAGES["messages"][0]], "completion": [MESSAGES["messages"][1]]},
    ],
)
def test_common_rows_are_conversations_of_two_turns(jsonl, chatml, row, caplog):
    with caplog.at_level("INFO"):
        dataset = opened(jsonl(row), chatml, chat=True, chat_template="tokenizer")
    assert dataset[0] == opened(jsonl(MESSAGES), chatml, chat=True, chat_template="tokenizer")[0]
    assert "holds rows of {" in caplog.text


def test_texts_given_to_a_model_with_a_template_get_a_hint(jsonl, chatml, bpe, caplog):
    with caplog.at_level("INFO"):
        opened(jsonl({"input": "Hi", "output": "Hello"}), bpe)
        assert not caplog.records
        opened(jsonl({"input": "Hi", "output": "Hello"}), chatml)
    assert "set model.data.chat=True" in caplog.text


def test_a_row_that_teaches_nothing_names_its_line(jsonl, bpe):
    path = jsonl({"input": "a", "output": "b"}, "", {"input": "a", "output": ""})
    with pytest.raises(UserError, match="no token of this row is learned") as caught:
        opened(path, bpe, split={"add_eos": False})
    assert caught.value.problem.startswith(f"{path}, line 3: ")


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
LONG = [{"role": "user", "content": "Hi there " * 30}, TURNS[1]]


def test_a_chat_without_room_is_left_out_and_named(jsonl, chatml, caplog):
    rows = [{"messages": TURNS}] * 3
    rows[1:1] = [{"messages": LONG}, {"messages": TURNS, "weight": 0}]
    path = jsonl(*rows)
    with caplog.at_level(logging.INFO):
        dataset = opened(path, chatml, chat=True, split={"max_seq_length": 64})
    assert len(dataset) == 3
    assert len({tuple(dataset[i].tokens) for i in range(3)}) == 1
    assert (
        "1 of 5 rows leave no room for a response within max_seq_length=64 and are left out: line 2"
        in caplog.text
    )
    assert (
        "1 of 5 rows say that they are not learned (weight or train) and are left out: line 3" in caplog.text
    )
    whole = opened(jsonl(rows[0], name="whole.jsonl"), chatml, chat=True)
    assert whole.fingerprint.keys() == {"rows"}
    assert dataset.fingerprint.keys() == {"rows", "samples"}
    with pytest.raises(UserError, match="has nothing to learn: of 1 rows 1 leave no room"):
        opened(jsonl({"messages": LONG}), chatml, chat=True, split={"max_seq_length": 64})


def test_a_prompt_without_room_is_left_out(jsonl, bpe, caplog):
    path = jsonl(
        {"input": "a", "output": "b"}, {"input": "a " * 40, "output": "b"}, {"input": "c", "output": "d" * 40}
    )
    with caplog.at_level(logging.INFO):
        dataset = opened(path, bpe, split={"max_seq_length": 20, "truncation_field": None})
    assert [describe(dataset[i], bpe) for i in range(2)] == ["a⟦ b</s>⟧", f"c⟦ {'d' * 17}</s>⟧"]
    assert "left out: line 2" in caplog.text
    assert "1 of 2 samples are longer than max_seq_length=20 and are cut" in caplog.text


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}])
def test_a_row_that_is_not_learned_is_left_out(jsonl, bpe, flag):
    dataset = opened(jsonl({"input": "a", "output": "b"}, {"input": "c", "output": "d"} | flag), bpe)
    assert len(dataset) == 1


def test_a_template_that_rewrites_history_is_counted(jsonl, make_hf, caplog):
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] | upper if m['role'] == 'assistant' and not loop.last else m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = load_tokenizer("huggingface", make_hf(chat_template=template))
    path = jsonl({"messages": [*TURNS, *TURNS]}, {"messages": TURNS})
    with caplog.at_level(logging.INFO):
        dataset = opened(path, tokenizer, chat=True)
    assert len(dataset) == 3
    assert "the chat template rewrites earlier turns, so 2 rows make 3 samples" in caplog.text
    assert len(opened(path, tokenizer, chat=True, learn="last")) == 2


def test_settings_of_chats_are_checked():
    split = SFTSplitConfig(file_path="rows.jsonl")
    for settings, problem in (
        ({"learn": "first"}, "model.data.learn='first'"),
        ({"chat_date": "today"}, "model.data.chat_date='today' is no date"),
        ({"chat_template": "mine"}, "model.data.chat_template='mine'"),
    ):
        with pytest.raises(UserError, match=problem):
            SFTDataConfig(train_ds=split, **settings)
