# SPDX-License-Identifier: Apache-2.0
"""Data sets from files: which layout is chosen, and where errors are said to be."""

import pytest

from nemo_aligner.data.config import ChatPromptTokens, SFTDataConfig, SFTSplitConfig
from nemo_aligner.data.datasets import describe, open_sft
from nemo_aligner.errors import UserError

MESSAGES = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def opened(path, tokenizer, *, answer_only_loss=True, split=None, **settings):
    split = SFTSplitConfig(file_path=str(path), **(split or {}))
    data = SFTDataConfig(train_ds=split, validation_ds=split, **settings)
    return open_sft(data, split, tokenizer, answer_only_loss=answer_only_loss)


def test_prompt_and_answer(jsonl, bpe):
    dataset = opened(jsonl({"input": "a", "output": "b"}, {"input": "c", "output": "d"}), bpe)
    assert [describe(dataset[i], bpe) for i in range(len(dataset))] == ["a⟦ b</s>⟧", "c⟦ d</s>⟧"]


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


def test_conversations_given_as_prompt_and_answer_name_the_setting(jsonl, bpe):
    with pytest.raises(UserError, match="line 1: the row is a conversation") as caught:
        opened(jsonl(MESSAGES), bpe)
    assert "model.data.chat=True" in caught.value.cure
    assert len(opened(jsonl(MESSAGES | {"input": "a", "output": "b"}), bpe)) == 1
    with pytest.raises(UserError, match="line 1: key 'conversations' is missing") as caught:
        opened(jsonl({"txt": "a"}), bpe, chat=True)
    assert "model.data.chat=False" in caught.value.cure


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
