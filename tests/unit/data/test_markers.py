# SPDX-License-Identifier: Apache-2.0
"""Prompt tokens as a chat template: whoever renders it sends what stands before a response in training."""

import pytest
from transformers import AutoTokenizer

from nemo_aligner.data.chat import PromptTokensLayout, TemplateLayout
from nemo_aligner.data.config import ChatPromptTokens, SFTDataConfig, SFTSplitConfig
from nemo_aligner.data.datasets import uses_prompt_tokens
from nemo_aligner.data.markers import is_usual_template, marker_template
from nemo_aligner.data.requests import tokens_of
from nemo_aligner.data.tokenizer import load_tokenizer
from nemo_aligner.errors import UserError

EXTRA = ChatPromptTokens(
    system_turn_start="<extra_id_0>", turn_start="<extra_id_1>", label_start="<extra_id_2>"
)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "|Hello"},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": " Me\n"},
]
SPLIT = SFTSplitConfig(file_path="chats.jsonl")


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("prefix_space", [False, True])
@pytest.mark.parametrize("messages", [MESSAGES, MESSAGES[1:]])
def test_transformers_asks_as_training_did(make_hf, adds_bos, prefix_space, messages):
    folder = make_hf(adds_bos=adds_bos, prefix_space=prefix_space)
    tokenizer, theirs = load_tokenizer("huggingface", folder), AutoTokenizer.from_pretrained(folder)
    layout = PromptTokensLayout(tokenizer, EXTRA, SPLIT)
    [sample] = layout(layout.read({"messages": messages}))
    theirs.chat_template = layout.chat_template
    tokenizer.use_chat_template(layout.chat_template)
    learned = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = theirs.apply_chat_template(messages[:i], add_generation_prompt=True, return_dict=False)
        assert sample.tokens[: len(asked)] == asked == tokens_of(messages[:i], tokenizer)
        assert not any(sample.sequences[0].loss_mask[learned : len(asked)])
        learned = (
            sample.sequences[0].loss_mask.index(False, len(asked))
            if False in sample.sequences[0].loss_mask[len(asked) :]
            else len(sample.sequences[0].loss_mask)
        )
        assert tokenizer.decode(sample.tokens[len(asked) : learned]).removesuffix("</s>").lstrip() == (
            f"{message['content']}\n<extra_id_1>".lstrip()
        )
    again = TemplateLayout(tokenizer, SPLIT)
    [templated] = again(again.read({"messages": messages}))
    assert [*templated.tokens, tokenizer.eos_id] == sample.tokens
    assert [*templated.sequences[0].loss_mask, True] == sample.sequences[0].loss_mask


@pytest.mark.parametrize("add_bos", [None, True])
def test_a_sentencepiece_file_takes_a_template_too(spm, add_bos, tmp_path):
    split = SFTSplitConfig(file_path="chats.jsonl", add_bos=add_bos)
    layout = PromptTokensLayout(spm, EXTRA, split)
    [sample] = layout(layout.read({"messages": MESSAGES}))
    spm.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(layout.chat_template)
    loaded = load_tokenizer("sentencepiece", tmp_path / "tokenizer.model")
    asked = tokens_of(MESSAGES[:4], loaded)
    assert sample.tokens[: len(asked)] == asked
    assert (asked[0] == spm.bos_id) == bool(add_bos)


def test_no_control_character_stands_in_the_template():
    template = marker_template(ChatPromptTokens(), starts_with_bos=False)
    assert template.isprintable()
    assert is_usual_template(template)
    assert not is_usual_template(marker_template(EXTRA, starts_with_bos=True))


def test_the_system_message_comes_first(make_hf):
    tokenizer = load_tokenizer("huggingface", make_hf())
    tokenizer.use_chat_template(marker_template(EXTRA, starts_with_bos=False))
    with pytest.raises(UserError, match="the system message comes first"):
        tokenizer.render_chat([MESSAGES[1], MESSAGES[0]])


@pytest.mark.parametrize(
    ("template", "settings", "markers"),
    [
        ("own", {}, False),
        ("own", {"chat_template": "prompt_tokens"}, True),
        ("own", {"chat_prompt_tokens": EXTRA}, True),
        (None, {}, True),
        (None, {"chat_template": "tokenizer"}, False),
        (marker_template(ChatPromptTokens(), starts_with_bos=False), {}, True),
        (marker_template(EXTRA, starts_with_bos=False), {}, False),
        (marker_template(EXTRA, starts_with_bos=False), {"chat_prompt_tokens": EXTRA}, True),
    ],
)
def test_the_tokenizers_own_template_comes_first(make_hf, template, settings, markers):
    tokenizer = load_tokenizer("huggingface", make_hf(chat_template=template))
    data = SFTDataConfig(train_ds=SPLIT, **settings)
    assert uses_prompt_tokens(data, tokenizer) == markers


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "key 'tools' cannot be shown"),
        ({"messages": [*MESSAGES[:4], MESSAGES[4] | {"reasoning_content": "a"}]}, "key 'reasoning_content' of turn 4"),
        ({"messages": [MESSAGES[1] | {"name": "Ann"}, MESSAGES[2]]}, "key 'name' of turn 1"),
        ({"messages": [MESSAGES[1], {"role": "tool", "content": "a"}, MESSAGES[2]]}, "the role 'tool' of turn 2"),
    ],
)  # fmt: skip
def test_what_prompt_tokens_cannot_show(bpe, row, problem):
    with pytest.raises(UserError, match=problem):
        PromptTokensLayout(bpe, EXTRA, SPLIT).read(row)
