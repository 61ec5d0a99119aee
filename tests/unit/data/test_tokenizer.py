# SPDX-License-Identifier: Apache-2.0
"""Tokenizers against the libraries themselves."""

import pytest
import sentencepiece
from transformers import AutoTokenizer

from nemo_aligner.data.tokenizer import check_fits, encode_after, load_tokenizer
from nemo_aligner.errors import UserError

TEXTS = [
    "The capital of France is Paris.",
    " a leading space",
    "lines\n\nand  spaces",
    "<extra_id_1>User\nhé",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_hugging_face_encodes_as_transformers_without_specials(make_hf, text):
    folder = make_hf(adds_bos=True)
    ours, theirs = load_tokenizer("huggingface", folder), AutoTokenizer.from_pretrained(folder)
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_encodes_as_the_library(spm, sentencepiece_file, text):
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    assert spm.encode(text) == theirs.encode(text)
    assert (spm.vocab_size, spm.bos_id, spm.eos_id, spm.pad_id) == (theirs.get_piece_size(), 1, 2, 2)


def test_special_ids_come_from_the_files(make_hf):
    plain = load_tokenizer("huggingface", make_hf(bos_token=None))
    assert (plain.bos_id, plain.eos_id, plain.pad_id, plain.sep_id) == (None, 1, 1, None)
    full = load_tokenizer("huggingface", make_hf(pad_token="<unk>", sep_token="<extra_id_0>"))
    assert (full.bos_id, full.eos_id, full.pad_id, full.sep_id) == (0, 1, 2, 5)


def test_who_adds_bos_and_a_space(bpe, llama_like, spm):
    assert [t.adds_bos for t in (bpe, llama_like, spm)] == [False, True, False]
    assert [t.prefixes_space for t in (bpe, llama_like, spm)] == [False, True, True]


@pytest.mark.parametrize("name", ["bpe", "llama_like", "spm"])
@pytest.mark.parametrize("text", ["Paris", " Paris", "\nQuestion:", "<extra_id_1>User\n"])
def test_a_continuation_has_the_tokens_that_it_has_in_place(request, name, text):
    tokenizer = request.getfixturevalue(name)
    whole = tokenizer.encode("a:" + text)
    assert tokenizer.encode("a:") + encode_after(tokenizer, text) == whole


def test_vocab_size_counts_added_tokens(make_hf):
    folder = make_hf()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    grown = load_tokenizer("huggingface", folder)
    assert grown.vocab_size == len(tokenizer) == grown.token_id("<new>") + 1
    assert grown.token_id("no such entry") is None


def test_token_id_of_sentencepiece(spm):
    assert spm.token_id("<extra_id_1>") == spm.encode("<extra_id_1>")[-1]
    assert spm.token_id("no such piece") is None
    assert spm.token_id("<unk>") == 0


def test_chat_is_rendered_as_transformers_does(chatml, make_hf):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert chatml.render_chat(messages[:1], add_generation_prompt=True) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    theirs = AutoTokenizer.from_pretrained(make_hf(chat_template=chatml.chat_template))
    assert chatml.render_chat(messages) == theirs.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("name", ["bpe", "spm"])
def test_no_chat_template(request, name):
    tokenizer = request.getfixturevalue(name)
    assert tokenizer.chat_template is None
    with pytest.raises(UserError, match="no chat template"):
        tokenizer.render_chat([{"role": "user", "content": "Hi"}])


def test_a_template_that_refuses_the_roles(make_hf):
    refusing = load_tokenizer(
        "huggingface", make_hf(chat_template="{{ raise_exception('roles must alternate') }}")
    )
    with pytest.raises(UserError, match=r"\['user', 'user'\].*roles must alternate"):
        refusing.render_chat([{"role": "user", "content": "Hi"}] * 2)


@pytest.mark.parametrize("name", ["chatml", "spm"])
def test_saved_files_make_the_same_tokenizer(request, tmp_path, name):
    tokenizer = request.getfixturevalue(name)
    tokenizer.save(tmp_path / "saved")
    library, path = (
        ("huggingface", "saved") if name == "chatml" else ("sentencepiece", "saved/tokenizer.model")
    )
    again = load_tokenizer(library, tmp_path / path)
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert (again.eos_id, again.pad_id, again.chat_template) == (
        tokenizer.eos_id,
        tokenizer.pad_id,
        tokenizer.chat_template,
    )


@pytest.mark.parametrize(
    ("library", "files", "problem"),
    [
        ("huggingface", None, "no tokenizer folder"),
        ("huggingface", {}, "does not load"),
        ("huggingface", {"tokenizer.json": "{broken"}, "does not load"),
        ("huggingface", {"config.json": '{"model_type": "llama"}'}, "does not load"),
        ("sentencepiece", {}, "no tokenizer file"),
    ],
)
def test_bad_folders(tmp_path, library, files, problem):
    folder = tmp_path / "tokenizer"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    with pytest.raises(UserError, match=problem) as caught:
        load_tokenizer(library, folder)
    assert caught.value.fix


def test_a_file_that_is_no_sentencepiece_model(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer("sentencepiece", path)


def test_no_end_of_sequence_token(make_hf):
    with pytest.raises(UserError, match="no end-of-sequence"):
        load_tokenizer("huggingface", make_hf(eos_token=None))


def test_wrong_tokenizer(bpe):
    check_fits(bpe, bpe.vocab_size)
    with pytest.raises(UserError, match=f"wrong tokenizer: its ids go up to {bpe.vocab_size - 1}"):
        check_fits(bpe, bpe.vocab_size - 1)
