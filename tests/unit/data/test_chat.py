# SPDX-License-Identifier: Apache-2.0
"""Conversations token by token, with prompt tokens and with chat templates."""

import pytest
from transformers import AutoTokenizer

from nemo_aligner.data.chat import PromptTokensLayout, TemplateLayout
from nemo_aligner.data.config import ChatPromptTokens, SFTSplitConfig
from nemo_aligner.data.conversations import Chat, Turn
from nemo_aligner.data.row import describe
from nemo_aligner.data.tokenizer import load_tokenizer
from nemo_aligner.errors import UserError

EXTRA = ChatPromptTokens(
    system_turn_start="<extra_id_0>", turn_start="<extra_id_1>", label_start="<extra_id_2>"
)


def conversation(*texts, system="", label=None, kind=None, mask="User"):
    turns = tuple(
        Turn(speaker=("User", "Assistant")[i % 2], text=text, label=label if i % 2 else None)
        for i, text in enumerate(texts)
    )
    return Chat(system=system, turns=turns, mask=mask, kind=kind)


def cfg(**settings):
    return SFTSplitConfig(file_path="chats.jsonl", **settings)


def with_prompt_tokens(tokenizer, chat, tokens=EXTRA, **settings):
    [sample] = PromptTokensLayout(tokenizer, tokens, cfg(**settings))(chat)
    return sample


def with_template(tokenizer, chat, **settings):
    [sample] = TemplateLayout(tokenizer, cfg(**settings))(chat)
    return sample


SYSTEM = "<extra_id_0>System\nBe brief.\n"


@pytest.mark.parametrize(
    ("chat", "shown"),
    [
        (
            conversation("Hi", "Hello", system="Be brief."),
            SYSTEM + "<extra_id_1>User\nHi\n<extra_id_1>Assistant\n⟦Hello\n<extra_id_1></s>⟧",
        ),
        (
            conversation("Hi", "Hello", "Who?", "Me", system="Be brief."),
            SYSTEM + "<extra_id_1>User\nHi\n<extra_id_1>Assistant\n⟦Hello\n<extra_id_1>⟧User\nWho?\n"
            "<extra_id_1>Assistant\n⟦Me\n<extra_id_1></s>⟧",
        ),
        (
            conversation("Hi", "Hello", "Bye"),
            "<extra_id_0>System\n\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\n⟦Hello\n<extra_id_1></s>⟧",
        ),
        (
            conversation("Hi", "Hello", label="quality:4", kind="VALUE_TO_TEXT", system="Be brief."),
            SYSTEM + "<extra_id_1>User\nHi\n<extra_id_1>Assistant\n<extra_id_2>quality:4\n"
            "⟦Hello\n<extra_id_1></s>⟧",
        ),
        (
            conversation("Hi", "Hello", label="quality:4", kind="TEXT_TO_VALUE", system="Be brief."),
            SYSTEM + "<extra_id_1>User\nHi\n<extra_id_1>Assistant\n"
            "Hello\n<extra_id_2>⟦quality:4\n<extra_id_1></s>⟧",
        ),
        (
            conversation("Hi", "Hello", kind="TEXT_TO_VALUE", system="Be brief."),
            SYSTEM + "<extra_id_1>User\nHi\n<extra_id_1>Assistant\n⟦Hello\n<extra_id_1></s>⟧",
        ),
        (
            conversation("Hi", "Hello", label="quality:4", system="Be brief."),
            SYSTEM + "<extra_id_1>User\nHi\n<extra_id_1>Assistant\n⟦Hello\n<extra_id_1></s>⟧",
        ),
        (
            conversation("Hi", "Hello", "Who?", mask="Assistant", system="Be brief."),
            SYSTEM + "<extra_id_1>User\nHi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\n"
            "⟦Who?\n<extra_id_1></s>⟧",
        ),
    ],
)
def test_turns_between_prompt_tokens(bpe, chat, shown):
    assert describe(with_prompt_tokens(bpe, chat), bpe) == shown


def test_default_prompt_tokens(bpe):
    sample = with_prompt_tokens(bpe, conversation("Hi", "Hello"), tokens=ChatPromptTokens())
    assert bpe.decode(sample.tokens) == "\x00System\n\n\x11User\nHi\n\x11Assistant\nHello\n\x11</s>"


@pytest.mark.parametrize("name", ["bpe", "llama_like", "spm"])
def test_the_prompt_has_the_tokens_of_a_prompt_alone(request, name):
    tokenizer = request.getfixturevalue(name)
    sample = with_prompt_tokens(
        tokenizer, conversation("Hi there", "Hello", system="Be brief."), add_bos=False
    )
    prompt = tokenizer.encode(SYSTEM + "<extra_id_1>User\nHi there\n<extra_id_1>Assistant\n")
    assert sample.tokens[: len(prompt)] == prompt
    assert sample.sequences[0].loss_mask.index(True) == len(prompt)
    assert sample.tokens[-1] == tokenizer.eos_id
    assert sample.tokens[-2] == tokenizer.token_id("<extra_id_1>")


def test_prompt_tokens_and_bos(llama_like):
    chat = conversation("Hi", "Hello")
    assert with_prompt_tokens(llama_like, chat).tokens.count(llama_like.bos_id) == 1
    assert with_prompt_tokens(llama_like, chat, add_bos=False).tokens.count(llama_like.bos_id) == 0


def test_prompt_tokens_that_the_tokenizer_cannot_write(llama_like):
    with pytest.raises(UserError, match=r"chat_prompt_tokens.system_turn_start='\\x00' cannot be written"):
        with_prompt_tokens(llama_like, conversation("Hi", "Hello"), tokens=ChatPromptTokens())


@pytest.mark.parametrize("name", ["bpe", "llama_like", "spm"])
def test_long_conversations_end_with_a_learned_turn(request, name):
    tokenizer = request.getfixturevalue(name)
    chat = conversation("Hi", "Hello there", "Where?", "The humps", system="Be brief.")
    whole = with_prompt_tokens(tokenizer, chat)
    first = whole.sequences[0].loss_mask.index(True)
    for length in range(first + 3, len(whole.tokens)):
        sample = with_prompt_tokens(tokenizer, chat, max_seq_length=length)
        assert sample.truncated
        assert len(sample.tokens) <= length
        assert sample.tokens[-2:] == [tokenizer.token_id("<extra_id_1>"), tokenizer.eos_id]
        assert sample.tokens[-3] != tokenizer.token_id("<extra_id_1>")
        assert sample.sequences[0].loss_mask[-3:] == [True] * 3
        kept = len(sample.tokens) - 2
        assert sample.tokens[:kept] == whole.tokens[:kept]
        assert sample.sequences[0].loss_mask[:kept] == whole.sequences[0].loss_mask[:kept]
    for length in (first + 2, 2):
        assert PromptTokensLayout(tokenizer, EXTRA, cfg(max_seq_length=length))(chat) == []


def test_chatml_learns_responses_and_their_end(chatml):
    chat = conversation("Hi", "Hello", "Who?", "Me", system="Be brief.")
    assert describe(with_template(chatml, chat), chatml) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n<|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Me<|im_end|>⟧"
    )


def test_template_tokens_are_those_of_transformers(make_hf, chatml):
    folder = make_hf(chat_template=chatml.chat_template, eos_token="<|im_end|>")
    theirs = AutoTokenizer.from_pretrained(folder)
    sample = with_template(
        load_tokenizer("huggingface", folder),
        conversation("Hi", "\nHello ", "Who?", " Me", system="Be brief."),
    )
    messages = [
        {"role": role, "content": text}
        for role, text in zip(
            ["system", "user", "assistant", "user", "assistant"],
            ["Be brief.", "Hi", "\nHello ", "Who?", " Me"],
            strict=True,
        )
    ]
    ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert sample.tokens == ids[: len(sample.tokens)]
    assert theirs.decode(ids[len(sample.tokens) :]) == "\n"


def test_a_turn_ends_once_whatever_eos_is(make_hf, chatml):
    tokenizer = load_tokenizer("huggingface", make_hf(chat_template=chatml.chat_template))
    sample = with_template(tokenizer, conversation("Hi", "Hello"))
    assert describe(sample, tokenizer).endswith("⟦Hello<|im_end|>⟧")


PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)


def test_white_space_that_ends_a_turn_is_learned(make_hf):
    tokenizer = load_tokenizer("huggingface", make_hf(chat_template=PLAIN))
    shown = describe(with_template(tokenizer, conversation("Hi", "Hello", "Who?", "Me")), tokenizer)
    assert shown == "user: Hi\n\nassistant: ⟦Hello\n\n⟧user: Who?\n\nassistant: ⟦Me\n\n</s>⟧"


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("add_bos", [None, True, False])
def test_a_template_that_writes_bos_and_eos(make_hf, adds_bos, add_bos):
    tokenizer = load_tokenizer("huggingface", make_hf(chat_template=LLAMA2, adds_bos=adds_bos))
    shown = describe(
        with_template(tokenizer, conversation("Hi", "Hello", "Who?", "Me"), add_bos=add_bos), tokenizer
    )
    assert shown == "<s>[INST] Hi [/INST]⟦ Hello </s>⟧[INST] Who? [/INST]⟦ Me </s>⟧"


def test_bos_before_a_template_without_one(make_hf):
    tokenizer = load_tokenizer("huggingface", make_hf(chat_template=PLAIN, adds_bos=True))
    chat = conversation("Hi", "Hello")
    assert describe(with_template(tokenizer, chat), tokenizer).startswith("user: ")
    assert describe(with_template(tokenizer, chat, add_bos=True), tokenizer).startswith("<s>user: ")


def test_responses_that_look_like_the_markup(chatml):
    shown = describe(with_template(chatml, conversation("Hi", "end", "Who?", "im", "So?", "")), chatml)
    assert "⟦end<|im_end|>⟧" in shown
    assert "⟦im<|im_end|>⟧" in shown
    assert shown.endswith("<|im_start|>assistant\n⟦<|im_end|>⟧")


@pytest.mark.parametrize("length", [17, 20, 30, 34])
def test_long_templated_conversations_end_with_eos(chatml, length):
    chat = conversation("a", "bcdefghij", "k", "lmnopqrstuvw")
    whole = with_template(chatml, chat)
    sample = with_template(chatml, chat, max_seq_length=length)
    assert sample.truncated
    assert len(sample.tokens) <= length
    assert sample.tokens[-1] == chatml.eos_id
    assert sample.tokens[-2] != chatml.eos_id
    assert sample.sequences[0].loss_mask[-2:] == [True, True]
    assert sample.tokens[:-1] == whole.tokens[: len(sample.tokens) - 1]


REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last %}{{ m['content'] }}{% else %}{{ m['content'].split('|')[-1] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_history_makes_a_row_per_turn(make_hf):
    tokenizer = load_tokenizer("huggingface", make_hf(chat_template=REWRITING))
    chat = conversation("Hi", "thought|Hello", "Who?", "thought|Me")
    start, ask = (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n<|im_start|>user\nWho?",
    )
    samples = TemplateLayout(tokenizer, cfg())(chat)
    assert [describe(sample, tokenizer) for sample in samples] == [
        f"{start}⟦thought|Hello<|im_end|>⟧",
        f"{start}Hello{ask}<|im_end|>\n<|im_start|>assistant\n⟦thought|Me<|im_end|>⟧",
    ]
    [last] = TemplateLayout(tokenizer, cfg(), learn="last")(chat)
    assert last == samples[1]


def test_a_template_is_needed(bpe):
    with pytest.raises(UserError, match="no chat template"):
        TemplateLayout(bpe, cfg())


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"conversations": [{"from": "User", "value": "a"}, {"from": "Bot", "value": "b"}]},
            r"speakers \['Bot'\]",
        ),
        (
            {
                "conversations": [{"from": name, "value": "a"} for name in ("User", "Assistant", "User")],
                "mask": "Assistant",
            },
            "mask 'Assistant' would train on the user's turns",
        ),
        (
            {
                "conversations": [{"from": name, "value": "a"} for name in ("User", "Assistant")],
                "type": "VALUE_TO_TEXT",
            },
            "asks for labels",
        ),
    ],
)
def test_conversations_that_no_template_can_show(chatml, row, problem):
    with pytest.raises(UserError, match=problem):
        TemplateLayout(chatml, cfg()).read(row)
