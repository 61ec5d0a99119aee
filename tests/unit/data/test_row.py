# SPDX-License-Identifier: Apache-2.0
"""How a text is encoded whole, and how a sample is shown."""

import pytest
from sentencepiece import SentencePieceTrainer

from nemo_aligner.data.row import Row, TextEncoder, TokenSequence, describe, most_tokens
from nemo_aligner.data.tokenizer import load_tokenizer
from nemo_aligner.errors import UserError


@pytest.mark.parametrize("name", ["bpe", "llama_like", "spm"])
def test_learned_tokens_are_marked(request, name):
    tokenizer = request.getfixturevalue(name)
    prompt, response = tokenizer.encode("camels use"), tokenizer.encode("camels use fat")
    response = response[len(prompt) :]
    mask = [False] * len(prompt) + [True] * len(response)
    row = Row(sequences=(TokenSequence(tokens=prompt + response, loss_mask=mask),))
    assert describe(row, tokenizer) == "camels use⟦ fat⟧"


def test_long_runs_are_shortened(bpe):
    tokens = bpe.encode("1" * 5000)
    shown = describe(Row(sequences=(TokenSequence(tokens=tokens, loss_mask=[False] * 5000),)), bpe)
    assert shown == "1" * 500 + " [... 4000 characters ...] " + "1" * 500


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("append_eos", [True, False])
@pytest.mark.parametrize(
    "text", ["camels use fat", "<s>camels use fat</s>", "<s>camels use fat", "camels use fat</s>"]
)
def test_a_text_has_each_special_token_once_at_most(llama_like, add_bos, append_eos, text):
    ids = TextEncoder(tokenizer=llama_like, add_bos=add_bos, append_eos=append_eos)(text)
    bos, eos = llama_like.bos_id, llama_like.eos_id
    assert ids.count(bos) == (ids[0] == bos)
    assert ids.count(eos) == (ids[-1] == eos)
    assert (ids[0] == bos) == (add_bos is not False or text.startswith("<s>"))
    assert (ids[-1] == eos) == (append_eos or text.endswith("</s>"))


def test_bos_is_not_added_where_the_tokenizer_does_not(bpe, spm):
    for tokenizer in (bpe, spm):
        encode = TextEncoder(tokenizer=tokenizer, add_bos=None, append_eos=False)
        assert encode("camels") == tokenizer.encode("camels")


def test_bos_of_a_tokenizer_without_one_is_refused(make_hf):
    tokenizer = load_tokenizer("huggingface", make_hf(bos_token=None))
    with pytest.raises(UserError, match="no beginning-of-sequence token"):
        TextEncoder(tokenizer=tokenizer, add_bos=True, append_eos=False)("a")


@pytest.mark.parametrize("name", ["bpe", "llama_like", "spm"])
@pytest.mark.parametrize(
    "text", ["", "a", "camels" * 50, "zq" * 99, "\n\t  {", "é", "日本語", "🦙" * 9, "\ufdfa" * 9, "x\u0301"]
)
def test_no_text_has_more_tokens_than_foretold(request, name, text):
    encode = TextEncoder(tokenizer=request.getfixturevalue(name), add_bos=None, append_eos=True)
    assert len(encode(text)) <= most_tokens(text)


def test_no_normalised_text_has_more_tokens_than_foretold(tmp_path):
    # Unlike the other tokenizers of these tests it writes a ligature out: 3 bytes become 33.
    SentencePieceTrainer.train(
        sentence_iterator=iter(["camels use fat"] * 9),
        model_prefix=str(tmp_path / "nfkc"),
        vocab_size=275,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="nfkc",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    encode = TextEncoder(
        tokenizer=load_tokenizer("sentencepiece", tmp_path / "nfkc.model"), add_bos=None, append_eos=True
    )
    text = "\ufdfa" * 9
    assert len(text.encode()) < len(encode(text)) <= most_tokens(text)
