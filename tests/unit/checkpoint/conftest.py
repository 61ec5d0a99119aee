# SPDX-License-Identifier: Apache-2.0
"""Tiny Hugging Face folders, written by transformers, with weights that no two layers share."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.implementations import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    NemotronConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 16}
YARN_DEEPSEEK = YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707, "beta_slow": 2.0}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama2": lambda: LlamaConfig(**SIZES),
    "llama3": lambda: LlamaConfig(**SIZES, num_key_value_heads=2, rope_parameters=LLAMA3_ROPE),
    "llama-linear": lambda: LlamaConfig(**SIZES, rope_parameters=LINEAR_ROPE, head_dim=16),
    "llama-bias": lambda: LlamaConfig(**SIZES, num_key_value_heads=1, attention_bias=True, mlp_bias=True),
    "llama-square": lambda: LlamaConfig(**SIZES | {"intermediate_size": 64}, num_key_value_heads=2),
    "llama-yarn": lambda: LlamaConfig(
        **SIZES, num_key_value_heads=2, rope_parameters=YARN_DEEPSEEK, attention_bias=True
    ),
    "llama-mlp-bias": lambda: LlamaConfig(**SIZES, num_key_value_heads=2, mlp_bias=True),
    "smollm2": lambda: LlamaConfig(
        **SIZES, num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-5
    ),
    "mistral": lambda: MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=7, head_dim=12),
    "mistral-full": lambda: MistralConfig(**SIZES, num_key_value_heads=4, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SIZES, num_key_value_heads=2, rope_parameters=LINEAR_ROPE),
    "qwen2-yarn": lambda: Qwen2Config(
        **SIZES, num_key_value_heads=2, rope_parameters=YARN, tie_word_embeddings=True
    ),
    "qwen2-window": lambda: Qwen2Config(
        **SIZES, num_key_value_heads=4, use_sliding_window=True, sliding_window=7, max_window_layers=0
    ),
    "qwen3": lambda: Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=12, rope_parameters=LLAMA3_ROPE),
    "qwen3-yarn": lambda: Qwen3Config(
        **SIZES,
        num_key_value_heads=2,
        head_dim=12,
        attention_bias=True,
        rope_parameters=YARN | {"attention_factor": 0.9, "beta_fast": 8.0, "truncate": False},
    ),
    "qwen3-tied": lambda: Qwen3Config(**SIZES, num_key_value_heads=4, head_dim=8, tie_word_embeddings=True),
    "nemotron": lambda: NemotronConfig(**SIZES, num_key_value_heads=2, rope_parameters=dict(LLAMA3_ROPE)),
    "nemotron-attention-bias": lambda: NemotronConfig(**SIZES, num_key_value_heads=2, attention_bias=True),
    "nemotron-bias": lambda: NemotronConfig(
        **SIZES,
        num_key_value_heads=4,
        attention_bias=True,
        mlp_bias=True,
        head_dim=16,
        partial_rotary_factor=0.25,
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of CONFIGS with random norms and biases too."""
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.ndim == 1))
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=[2, 3], temperature=0.7, do_sample=True
    )
    return model.to(dtype).eval()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=101, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(["the lamp is lit", "the capital of France", "one two three"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"
    return fast


CORPUS = ["the lamp is lit", "the capital of France", "one two three"] * 5


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SentencePiece model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def gpt2_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """vocab.json and merges.txt of a byte-level BPE, as GPT-2's."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(CORPUS, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    folder = tmp_path_factory.mktemp("gpt2")
    vocab, merges = bpe.save_model(str(folder))
    return Path(vocab), Path(merges)


@pytest.fixture
def hf_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes the folder of a model of CONFIGS; options go to save_pretrained."""

    def write(
        name: str, dtype: torch.dtype = torch.float32, *, tokenizer: bool = True, **options: Any
    ) -> Path:
        folder = tmp_path / "hf"
        build(name, dtype).save_pretrained(folder, **options)
        if tokenizer:
            build_tokenizer().save_pretrained(folder)
        return folder

    return write


class _Hostile:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self._path,))


@pytest.fixture
def hostile(tmp_path: Path) -> object:
    """An object whose unpickling would create the file "ran"."""
    return _Hostile(tmp_path / "ran")
