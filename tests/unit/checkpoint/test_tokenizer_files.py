# SPDX-License-Identifier: Apache-2.0
"""The tokenizers that a .nemo may hold, against the libraries that made them."""

import os
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers.implementations import ByteLevelBPETokenizer
from transformers import AutoTokenizer

from nemo_aligner.checkpoint.nemo_archive import NemoArchive
from nemo_aligner.checkpoint.tokenizer_files import archived_tokenizer_files, load_archived_tokenizer
from nemo_aligner.errors import UserError

TEXTS = ["the capital of France", " one\n\ntwo  three", "é ✓ <|endoftext|>x", ""]
GPT2 = {
    "library": "megatron",
    "type": "GPT2BPETokenizer",
    "vocab_file": "nemo:a_vocab.json",
    "merge_file": "nemo:b_merges.txt",
}


@pytest.fixture
def gpt2_archive(tmp_path: Path, gpt2_files: tuple[Path, Path]) -> NemoArchive:
    for name, path in zip(("a_vocab.json", "b_merges.txt"), gpt2_files, strict=True):
        (tmp_path / name).write_bytes(path.read_bytes())
    return archive(tmp_path, GPT2)


def archive(folder: Path, tokenizer: dict[str, Any] | None) -> NemoArchive:
    return NemoArchive(source=folder, folder=folder, config={"tokenizer": tokenizer})


def test_gpt2_s_bpe(gpt2_archive: NemoArchive, gpt2_files: tuple[Path, Path]):
    theirs = ByteLevelBPETokenizer(*map(str, gpt2_files))
    theirs.add_special_tokens(["<|endoftext|>"])
    ours = load_archived_tokenizer(gpt2_archive)
    assert ours is not None
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    end = theirs.token_to_id("<|endoftext|>")
    assert (ours.vocab_size, ours.eos_id, ours.bos_id, ours.adds_bos) == (
        theirs.get_vocab_size(),
        end,
        end,
        False,
    )


def test_gpt2_s_files_are_exported_so_that_transformers_loads_them(gpt2_archive: NemoArchive, tmp_path: Path):
    ours = load_archived_tokenizer(gpt2_archive)
    assert ours is not None
    out = tmp_path / "out"
    out.mkdir()
    for name, content in archived_tokenizer_files(gpt2_archive).items():
        (out / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    theirs = AutoTokenizer.from_pretrained(out)
    assert [theirs(text).input_ids for text in TEXTS] == [ours.encode(text) for text in TEXTS]


def test_sentencepiece(tmp_path: Path, sentencepiece_model: Path):
    (tmp_path / "7f_nemo.model").write_bytes(sentencepiece_model.read_bytes())
    block = {
        "library": "sentencepiece",
        "type": None,
        "model": "nemo:7f_nemo.model",
        "sentencepiece_legacy": False,
    }
    ours = load_archived_tokenizer(archive(tmp_path, block))
    theirs = SentencePieceProcessor(model_file=str(sentencepiece_model))
    assert ours is not None
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    assert archived_tokenizer_files(archive(tmp_path, block)) == {
        "tokenizer.model": tmp_path / "7f_nemo.model"
    }


def test_no_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    assert load_archived_tokenizer(archive(tmp_path, None)) is None
    assert archived_tokenizer_files(archive(tmp_path, None)) == {}
    assert "holds no tokenizer files" in caplog.text


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"library": "huggingface", "type": "meta-llama/Meta-Llama-3-8B"},
            r"is not in it[\s\S]*Meta-Llama-3-8B",
        ),
        ({"library": "megatron", "type": "GPT2BPETokenizer", "vocab_file": None}, "is not in it"),
        (GPT2 | {"type": "BertWordPieceCase"}, "not supported: .*BertWordPieceCase"),
        (GPT2 | {"vocab_file": "nemo:missing.json"}, "holds no nemo:missing.json"),
        (GPT2 | {"vocab_file": "nemo:../out.json"}, "outside the archive"),
        ({"library": "sentencepiece", "model": None}, "is not in it"),
        ({"library": "tabular", "model": "x", "delimiter": ","}, "tabular"),
        (GPT2 | {"special_tokens": {"sep_token": "<sep>"}}, r"tokenizer\.special_tokens=.*<sep>"),
        (GPT2 | {"additional_special_tokens": ["<a>"]}, r"tokenizer\.additional_special_tokens=.*<a>"),
    ],
)
def test_what_cannot_be_loaded_is_refused(gpt2_archive: NemoArchive, block: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message) as caught:
        load_archived_tokenizer(archive(gpt2_archive.folder, block))
    assert caught.value.fix


def test_the_published_gpt2_vocabulary(tmp_path: Path):
    data = os.environ.get("NEMO_ALIGNER_TEST_DATA")
    if not data or not (folder := Path(data, "gpt2_tokenizer")).is_dir():
        pytest.skip("NEMO_ALIGNER_TEST_DATA names no folder with gpt2_tokenizer, which is optional data")
    for name, source in (("a_vocab.json", "vocab.json"), ("b_merges.txt", "merges.txt")):
        (tmp_path / name).write_bytes((folder / source).read_bytes())
    tokenizer = load_archived_tokenizer(archive(tmp_path, GPT2))
    assert tokenizer is not None
    # As transformers' documentation of its GPT-2 tokenizer has them.
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode(" Hello world") == [18435, 995]
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (50257, 50256)
