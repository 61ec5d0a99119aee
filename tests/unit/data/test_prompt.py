# SPDX-License-Identifier: Apache-2.0
"""Prompt and response token by token: pieces, special tokens, masks, truncation."""

import pytest
from transformers import AutoTokenizer

from nemo_aligner.data.config import SFTSplitConfig
from nemo_aligner.data.prompt import PromptResponseLayout
from nemo_aligner.data.records import PromptResponse
from nemo_aligner.data.tokenizer import load_tokenizer
from nemo_aligner.errors import UserError


def lay_out(tokenizer, fields, *, answer_only_loss=True, **settings):
    layout = PromptResponseLayout(
        tokenizer, SFTSplitConfig(file_path="rows.jsonl", **settings), answer_only_loss=answer_only_loss
    )
    [sample] = layout(PromptResponse(fields=fields))
    return sample


def learned(sample):
    return [token for token, mask in zip(sample.tokens, sample.sequences[0].loss_mask, strict=True) if mask]


ROW = {"input": "  The capital of France is ", "output": " Paris "}


def test_pieces_are_tokenised_by_themselves(bpe):
    sample = lay_out(bpe, ROW)
    prompt, response = bpe.encode("The capital of France is"), bpe.encode(" Paris")
    assert sample.tokens == [*prompt, *response, bpe.eos_id]
    assert sample.sequences[0].loss_mask == [False] * len(prompt) + [True] * (len(response) + 1)
    assert not sample.truncated


@pytest.mark.parametrize("name", ["bpe", "llama_like", "spm"])
@pytest.mark.parametrize(
    "template",
    ["{input} {output}", r"Question: {input}\nAnswer: {output}", "{input}|{output}", "a  {input}{output}"],
)
def test_the_prompt_has_the_tokens_of_a_prompt_alone(request, name, template):
    tokenizer = request.getfixturevalue(name)
    sample = lay_out(
        tokenizer, {"input": "letters, too", "output": "fat"}, prompt_template=template, add_bos=False
    )
    text = template.replace(r"\n", "\n").replace("{input}", "letters, too")
    prompt = tokenizer.encode(text.removesuffix(" {output}").removesuffix("{output}"))
    assert sample.tokens[: len(prompt)] == prompt
    assert sample.sequences[0].loss_mask.index(True) == len(prompt)
    assert tokenizer.decode(sample.tokens).removesuffix("</s>") == text.replace("{output}", "fat")


def test_dolly_row_as_transformers_would_tokenise_it(make_hf):
    folder = make_hf(prefix_space=True, adds_bos=True)
    theirs = AutoTokenizer.from_pretrained(folder)
    sample = lay_out(load_tokenizer("huggingface", folder), ROW)
    assert sample.tokens == [*theirs.encode("The capital of France is Paris"), theirs.eos_token_id]


def test_loss_on_all_but_the_first_token(bpe, llama_like):
    for tokenizer in (bpe, llama_like):
        sample = lay_out(tokenizer, ROW, answer_only_loss=False)
        assert sample.sequences[0].loss_mask == [False] + [True] * (len(sample.tokens) - 1)


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("text", ["Hi", "<s>Hi", "<s><s>Hi"])
@pytest.mark.parametrize("template", ["{input} {output}", "{output}"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_at_most_one_bos_and_never_learned(make_hf, add_bos, text, template, adds_bos):
    tokenizer = load_tokenizer("huggingface", make_hf(adds_bos=adds_bos))
    field = "input" if "input" in template else "output"
    sample = lay_out(
        tokenizer,
        {"input": "", "output": "there"} | {field: text},
        prompt_template=template,
        add_bos=add_bos,
        truncation_field=None,
        answer_only_loss=False,
    )
    wanted = text != "Hi" or (adds_bos if add_bos is None else add_bos)
    assert sample.tokens.count(tokenizer.bos_id) == int(wanted)
    assert (sample.tokens[0] == tokenizer.bos_id) == wanted
    assert not sample.sequences[0].loss_mask[0]


def test_bos_that_the_tokenizer_lacks(make_hf):
    tokenizer = load_tokenizer("huggingface", make_hf(bos_token=None))
    assert tokenizer.decode(lay_out(tokenizer, ROW).tokens).startswith("The")
    with pytest.raises(UserError, match="add_bos=True"):
        lay_out(tokenizer, ROW, add_bos=True)


@pytest.mark.parametrize("pad_token", [None, "</s>", "<unk>"])
@pytest.mark.parametrize("output", ["Paris", "Paris</s>", "Paris</s></s>"])
def test_one_learned_eos_whatever_pads(make_hf, pad_token, output):
    tokenizer = load_tokenizer("huggingface", make_hf(pad_token=pad_token))
    sample = lay_out(tokenizer, {**ROW, "output": output})
    assert learned(sample) == [*tokenizer.encode(" Paris"), tokenizer.eos_id]


def test_eos_within_the_text_stays(bpe):
    sample = lay_out(bpe, {"input": "a</s>b", "output": "c</s>d"})
    assert sample.tokens.count(bpe.eos_id) == 3
    assert learned(sample).count(bpe.eos_id) == 2


def test_without_eos(bpe):
    assert learned(lay_out(bpe, ROW, add_eos=False)) == bpe.encode(" Paris")


def test_separator_before_the_response(make_hf):
    tokenizer = load_tokenizer("huggingface", make_hf(sep_token="<extra_id_0>"))
    sample = lay_out(tokenizer, ROW, add_sep=True)
    first = sample.sequences[0].loss_mask.index(True)
    assert sample.tokens[first - 1] == tokenizer.sep_id
    assert learned(sample) == [*tokenizer.encode(" Paris"), tokenizer.eos_id]


def test_separator_that_the_tokenizer_lacks(bpe):
    with pytest.raises(UserError, match="add_sep=True"):
        lay_out(bpe, ROW, add_sep=True)


def test_empty_values_leave_no_space(bpe):
    assert bpe.decode(lay_out(bpe, {"input": "", "output": "Paris"}).tokens) == " Paris</s>"
    nothing = lay_out(bpe, {"input": "Hi", "output": " "})
    assert bpe.decode(nothing.tokens) == "Hi</s>"
    with pytest.raises(UserError, match="no token of this row is learned"):
        lay_out(bpe, {"input": "Hi", "output": " "}, add_eos=False)


# Each character is one token here, so that lengths below can be counted by eye.
NUMBERS = {"a": "123456", "b": "78", "output": "90"}
TEMPLATE = "{a}|{b}|{output}"


@pytest.mark.parametrize(
    ("length", "field", "method", "text"),
    [
        (13, "a", "right", "123456|78|90</s>"),
        (12, "a", "right", "12345|78|90</s>"),
        (12, "a", "left", "23456|78|90</s>"),
        (10, "a,b", "right", "1234|7|90</s>"),
        (10, "a, b", "left", "3456|8|90</s>"),
        (9, "a,b", "right", "1234||90</s>"),
        (5, "a,b", "right", "||90</s>"),
        (4, "a,b", "right", "||9</s>"),
        (11, "b", "left", "123456||90</s>"),
        (10, "b", "left", "123456||9</s>"),
        (12, None, "right", "123456|78|9</s>"),
        (12, "output", "left", "123456|78|0</s>"),
        (9, "a,b,output", "right", "1234|7|9</s>"),
    ],
)
def test_truncation(bpe, length, field, method, text):
    sample = lay_out(
        bpe,
        NUMBERS,
        prompt_template=TEMPLATE,
        max_seq_length=length,
        truncation_field=field,
        truncation_method=method,
    )
    assert bpe.decode(sample.tokens) == text
    assert learned(sample) == bpe.encode(text.split("|")[-1])
    assert sample.truncated == (length < 13)
    assert len(sample.tokens) == length


@pytest.mark.parametrize("name", ["bpe", "llama_like", "spm"])
@pytest.mark.parametrize("length", range(4, 60, 5))
@pytest.mark.parametrize("method", ["left", "right"])
def test_a_truncated_row_fits_with_bos_and_eos(request, name, length, method):
    tokenizer = request.getfixturevalue(name)
    row = {"input": "camels use the fat in their humps " * 3, "output": "where do camels keep their water?"}
    sample = lay_out(tokenizer, row, max_seq_length=length, truncation_method=method, add_bos=True)
    whole = lay_out(tokenizer, row, add_bos=True)
    assert len(sample.tokens) == min(length, len(whole.tokens))
    assert sample.truncated == (len(whole.tokens) > length)
    assert sample.tokens[0] == tokenizer.bos_id
    assert learned(sample)[-1] == tokenizer.eos_id
    assert learned(sample)[:-1] == learned(whole)[: len(learned(sample)) - 1]


def test_a_prompt_that_leaves_no_room(bpe):
    settings = {"prompt_template": TEMPLATE, "truncation_field": "b", "max_seq_length": 9}
    layout = PromptResponseLayout(
        bpe, SFTSplitConfig(file_path="rows.jsonl", **settings), answer_only_loss=True
    )
    assert layout(PromptResponse(fields=NUMBERS)) == []


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"prompt_template": "{input}"}, r"does not end with its one {output}"),
        ({"prompt_template": "{output} {input}"}, r"does not end with its one {output}"),
        ({"prompt_template": "{output} {output}"}, r"does not end with its one {output}"),
        ({"label_key": "answer"}, r"does not end with its one {answer}"),
        ({"truncation_field": "input,context"}, r"names \['context'\]"),
    ],
)
def test_bad_templates(bpe, settings, problem):
    with pytest.raises(UserError, match=problem):
        lay_out(bpe, ROW, **settings)
