# SPDX-License-Identifier: Apache-2.0
"""Templates that read the clock, mark generations, or drop what a message says."""

from datetime import date

import pytest
from transformers import AutoTokenizer

from nemo_aligner.data.chat import TemplateLayout
from nemo_aligner.data.config import SFTSplitConfig
from nemo_aligner.data.requests import tokens_of
from nemo_aligner.data.row import describe
from nemo_aligner.data.tokenizer import load_tokenizer
from nemo_aligner.errors import UserError

DAY = date(2026, 1, 2)
TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CLOCK = "{{ strftime_now('%d %b %Y') }} {{ strftime_now( \"%Y\" ) }}\n"
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}END{% endgeneration %} .<|im_end|>\n"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}" + ASKS
)
USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello"}


def lay_out(tokenizer, row, **settings):
    layout = TemplateLayout(tokenizer, SFTSplitConfig(file_path="chats.jsonl"), **settings)
    return layout(layout.read(row))


def with_template(make_hf, template):
    return load_tokenizer("huggingface", make_hf(chat_template=template, eos_token="<|im_end|>"))


def test_the_day_is_pinned(make_hf):
    tokenizer = with_template(make_hf, CLOCK + TURNS + ASKS)
    assert tokenizer.reads_clock
    for day, shown in ((DAY, "02 Jan 2026 2026"), (date(2025, 3, 4), "04 Mar 2025 2025")):
        tokenizer.pin_clock(day)
        assert tokenizer.render_chat([USER]).startswith(f"{shown}\n")
    assert not with_template(make_hf, TURNS).reads_clock


def test_a_clock_that_cannot_be_pinned(make_hf):
    tokenizer = with_template(make_hf, "{% set f = '%Y' %}{{ strftime_now(f) }}" + TURNS)
    with pytest.raises(UserError, match="reads the clock in a way that cannot be pinned"):
        tokenizer.pin_clock(DAY)


def test_marks_of_the_template_are_used(make_hf):
    folder = make_hf(chat_template=MARKED, eos_token="<|im_end|>")
    tokenizer, theirs = load_tokenizer("huggingface", folder), AutoTokenizer.from_pretrained(folder)
    messages = [USER, REPLY, USER, {"role": "assistant", "content": "Me"}]
    [sample] = lay_out(tokenizer, {"messages": messages})
    found = theirs.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    stop = len(sample.tokens)
    assert sample.tokens == found["input_ids"][:stop]
    assert sample.sequences[0].loss_mask == [bool(mask) for mask in found["assistant_masks"][:stop]]
    assert not any(found["assistant_masks"][stop:])
    assert "⟦HelloEND⟧ .<|im_end|>" in describe(sample, tokenizer)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": [USER, REPLY | {"reasoning": "why"}]}, "key 'reasoning_content' of message 2"),
        ({"messages": [USER, REPLY | {"tool_calls": [{"type": "function"}]}]}, "key 'tool_calls' of message 2"),
        ({"messages": [USER | {"name": "Ann"}, REPLY]}, "key 'name' of message 1"),
        ({"messages": [USER, REPLY], "tools": [{"type": "function"}]}, "key 'tools'"),
        ({"messages": [USER, REPLY | {"content": "a<|im_end|>b"}]}, "holds '<|im_end|>', which ends a turn"),
        ({"messages": [USER, REPLY | {"content": "a\ud83d"}]}, "half of a surrogate pair"),
    ],
)  # fmt: skip
def test_what_the_template_drops_is_refused(make_hf, row, problem):
    with pytest.raises(UserError) as caught:
        lay_out(with_template(make_hf, TURNS + ASKS), row)
    assert problem in caught.value.problem
    assert caught.value.fix


def test_text_that_the_template_cuts_out_is_refused(make_hf):
    cutting = TURNS.replace("m['content']", "m['content'].split('</think>')[-1]") + ASKS
    tokenizer = with_template(make_hf, cutting)
    thought = REPLY | {"content": "<think>why</think>Hello"}
    with pytest.raises(
        UserError, match="drops or changes text of message 2: <think>why</think>Hello is written as"
    ):
        lay_out(tokenizer, {"messages": [USER, thought]})
    # What stands before is as inference sees it.
    [sample] = lay_out(tokenizer, {"messages": [USER, thought | {"weight": 0}, USER, REPLY]})
    assert "why" not in describe(sample, tokenizer)
    [last] = lay_out(tokenizer, {"messages": [USER, thought, USER, REPLY]}, learn="last")
    assert last == sample


def test_a_prompt_that_the_turn_does_not_go_on_from(make_hf):
    opening = TURNS + ASKS.replace("assistant\n", "assistant\n<think>\n")
    with pytest.raises(UserError, match="writes message 2 in another way than it asks for it"):
        lay_out(with_template(make_hf, opening), {"messages": [USER, REPLY]})


def test_a_token_across_the_border_is_not_learned(make_hf):
    folder = make_hf(chat_template=TURNS + ASKS, eos_token="<|im_end|>")
    tokenizer = load_tokenizer("huggingface", folder)
    reply = REPLY | {"content": "\n\n\nHello"}
    [sample] = lay_out(tokenizer, {"messages": [USER, reply]})
    prompt = tokens_of([USER], tokenizer)
    assert sample.tokens[: len(prompt)] == prompt
    assert sample.tokens[len(prompt) :] == tokenizer.encode("\n\n\nHello<|im_end|>")


@pytest.mark.parametrize("drops", ["tools", "name"])
def test_requests_are_checked_as_rows_are(make_hf, drops):
    tokenizer = with_template(make_hf, TURNS + ASKS)
    asked = [USER | ({"name": "Ann"} if drops == "name" else {})]
    with pytest.raises(UserError, match=f"key '{drops}'"):
        tokens_of(asked, tokenizer, tools=[{"type": "function"}] if drops == "tools" else None)
