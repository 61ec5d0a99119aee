# SPDX-License-Identifier: Apache-2.0
"""Small tokenizers of both libraries: byte-level BPE, BPE with a leading space, SentencePiece."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from nemo_aligner.data.tokenizer import Tokenizer, load_tokenizer

SPECIALS = [
    "<s>",
    "</s>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<extra_id_0>",
    "<extra_id_1>",
    "<extra_id_2>",
]

CORPUS = [
    "The capital of France is Paris. The capital of Italy is Rome.",
    "Question: where do camels keep their water? Response: camels use the fat in their humps.",
    "User and Assistant speak; the System listens. quality:4, toxicity:0",
    "the letters abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0 1 2 3 4 5 6 7 8 9 |,.:;?!{}<>",
] * 4

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def make_hf(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a Hugging Face tokenizer folder; ``prefix_space`` and ``adds_bos`` as Llama's have them."""

    def make(*, prefix_space: bool = False, adds_bos: bool = False, **special: str | None) -> Path:
        rust = RustTokenizer(models.BPE(unk_token="<unk>"))
        if prefix_space:
            rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
            rust.decoder = decoders.Metaspace(prepend_scheme="first")
            alphabet = sorted({*"".join(CORPUS), "\n", "▁"} - {" "})
        else:
            rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            rust.decoder = decoders.ByteLevel()
            alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=420, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
        )
        rust.train_from_iterator(CORPUS, trainer)
        if adds_bos:
            rust.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **special}
        chat_template = names.pop("chat_template", None)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=rust, **{name: token for name, token in names.items() if token is not None}
        )
        fast.chat_template = chat_template
        folder = tmp_path_factory.mktemp("tokenizer")
        fast.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def chatml(make_hf: Callable[..., Path]) -> Tokenizer:
    """Byte-level BPE with a ChatML template whose end-of-turn token is EOS, and which is PAD too."""
    return load_tokenizer(
        "huggingface", make_hf(chat_template=CHATML, eos_token="<|im_end|>", pad_token="<|im_end|>")
    )


@pytest.fixture(scope="session")
def bpe(make_hf: Callable[..., Path]) -> Tokenizer:
    """Byte-level BPE that adds nothing by itself and has no pad token."""
    return load_tokenizer("huggingface", make_hf())


@pytest.fixture(scope="session")
def llama_like(make_hf: Callable[..., Path]) -> Tokenizer:
    """BPE that starts a text with BOS and a space."""
    return load_tokenizer("huggingface", make_hf(prefix_space=True, adds_bos=True))


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece .model file with the extra ids as user-defined pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<extra_id_0>", "<extra_id_1>", "<extra_id_2>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sentencepiece") / "nemo.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def spm(sentencepiece_file: Path) -> Tokenizer:
    """The SentencePiece tokenizer."""
    return load_tokenizer("sentencepiece", sentencepiece_file)


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write rows to a JSONL file; strings go in as they are."""

    def write(*rows: object, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write
