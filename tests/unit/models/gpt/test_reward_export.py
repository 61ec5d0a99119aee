# SPDX-License-Identifier: Apache-2.0
"""Exported reward models, whose batches transformers scores from texts as we score them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    NemotronConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from nemo_aligner.batch import TokenBatch
from nemo_aligner.checkpoint.convert import export_to_huggingface, import_from_huggingface
from nemo_aligner.checkpoint.nemo_archive import NemoArchive, open_nemo, write_nemo
from nemo_aligner.checkpoint.sharded import load_model
from nemo_aligner.checkpoint.tokenizer_files import load_archived_tokenizer
from nemo_aligner.checkpoint.weights import WeightReader, save_weights
from nemo_aligner.data.reading import Reading
from nemo_aligner.data.row import TextEncoder
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.critic import GPTCritic
from nemo_aligner.models.gpt.heads import head_config
from nemo_aligner.models.gpt.model import build_gpt
from nemo_aligner.parallel.ranks import Layout

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_labels": 1,
    "pad_token_id": None,
}
FAMILIES: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "nemotron": NemotronConfig,
}
TEXTS = (
    *(
        "Is it lit?",
        "no",
        "User: naïve 你好\n\nAssistant: 12345",
        "a",
        "two  spaces ",
        "x" * 60,
        "b<",
        "a\nb\n",
    ),
)


def tokenizer(specials: Sequence[str], **named: str) -> PreTrainedTokenizerFast:
    """Bytes after the special tokens."""
    bytes_ = Tokenizer(models.BPE())
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(specials),
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bytes_.train_from_iterator([], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bytes_, **named)


TOKENIZERS: dict[str, Callable[[], tuple[PreTrainedTokenizerFast, int, str]]] = {
    # The tokenizer, the model's vocabulary, and the token that is to be its padding.
    "padding is EOS": lambda: (tokenizer(["</s>"], eos_token="</s>", pad_token="</s>"), 300, "<|pad|>"),
    "no room": lambda: (tokenizer(["</s>"], eos_token="</s>"), 257, "<|pad|>"),
    "no room in the padding either": lambda: (tokenizer(["</s>"], eos_token="</s>"), 384, "<|pad|>"),
    "unknown": lambda: (
        tokenizer(["<unk>", "<s>", "</s>"], eos_token="</s>", bos_token="<s>", unk_token="<unk>"),
        259,
        "<unk>",
    ),
    "reserved": lambda: (
        tokenizer(["</s>", "<|reserved_special_token_0|>"], eos_token="</s>"),
        258,
        "<|reserved_special_token_0|>",
    ),
    "its own": lambda: (tokenizer(["</s>", "[PAD]"], eos_token="</s>", pad_token="[PAD]"), 258, "[PAD]"),
}


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., Path]:
    """A reward model that remembers how its texts were read, as training saves it."""

    def make(family: str, tokens: PreTrainedTokenizerFast, vocab: int, **data: Any) -> Path:
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(FAMILIES[family](**SIZES, vocab_size=vocab))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0.7 if parameter.ndim == 1 else 0.0, 0.2)
        model.save_pretrained(tmp_path / "hf")
        tokens.save_pretrained(tmp_path / "hf")
        import_from_huggingface(tmp_path / "hf", str(tmp_path / "imported.nemo"))
        with open_nemo(tmp_path / "imported.nemo") as archive:
            assert archive.config["data"] == {"append_eod": False, "add_bos": None}
            reader = WeightReader(archive.weights)
            files = {p.relative_to(archive.folder).as_posix(): p for p in archive.folder.glob("tokenizer/*")}
            write_nemo(
                tmp_path / "rm.nemo",
                config=archive.config | {"data": data},
                files=files,
                weights=lambda out: save_weights(out, ((n, reader.read(n)) for n in list(reader.shapes)), 2),
            )
        return tmp_path / "rm.nemo"

    return make


def served(archive: NemoArchive) -> torch.Tensor:
    """[8] rewards of TEXTS, as a server gives them."""
    head, tokens = head_config(archive.config), load_archived_tokenizer(archive)
    reading = Reading.of(archive.config)
    assert head is not None
    assert tokens is not None
    assert reading is not None
    model = build_gpt(GPTConfig.from_dict(archive.config), Layout(), torch.float32, head=head).eval()
    load_model(model, archive.weights)
    encode = TextEncoder(tokenizer=tokens, add_bos=reading.add_bos, append_eos=reading.append_eod)
    rows = [(ids, [True] * len(ids)) for ids in map(encode, TEXTS)]
    return GPTCritic(model, head=head).infer(TokenBatch.from_rows(rows, pad_id=0, seq_length=70))


def scored(folder: Path) -> torch.Tensor:
    """[8] scores of TEXTS in one batch, as transformers has them."""
    model, tokens = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    assert model.config.pad_token_id == tokens.pad_token_id
    assert model.config.pad_token_id not in (None, tokens.eos_token_id, model.config.eos_token_id)
    with torch.no_grad():
        return model.eval()(**tokens(list(TEXTS), padding=True, return_tensors="pt")).logits[:, 0]


def check(nemo: Path, out: Path) -> None:
    export_to_huggingface(nemo, out)
    with open_nemo(nemo) as archive:
        expected = served(archive)
    assert expected.std() > 0.1
    torch.testing.assert_close(scored(out), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_padding_ends_no_text(trained: Callable[..., Path], tmp_path: Path, name: str):
    tokens, vocab, pad = TOKENIZERS[name]()
    if vocab == 384:
        tokens.add_tokens([f"word{i}" for i in range(127)])
    check(trained("llama", tokens, vocab, append_eod=True, add_bos=None), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token == pad
    # And comes back: the way in which texts are read too.
    import_from_huggingface(tmp_path / "out", str(tmp_path / "again.nemo"))
    with open_nemo(tmp_path / "again.nemo") as archive:
        assert archive.config["data"] == {"append_eod": True, "add_bos": None}
        torch.testing.assert_close(served(archive), scored(tmp_path / "out"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("append_eod", "add_bos"), [(True, True), (False, None), (True, False)])
def test_texts_are_read_as_in_training(
    trained: Callable[..., Path], tmp_path: Path, family: str, append_eod: bool, add_bos: bool | None
):
    tokens, vocab, _ = TOKENIZERS["unknown"]()
    check(trained(family, tokens, vocab, append_eod=append_eod, add_bos=add_bos), tmp_path / "out")
