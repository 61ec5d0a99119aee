# SPDX-License-Identifier: Apache-2.0
"""A Llama small enough to be pretrained in two minutes, and its tokenizer, as a Hugging Face folder."""

from collections.abc import Sequence
from pathlib import Path

__all__ = ["write_base_model"]

VOCAB_SIZE = 1024
MAX_TOKENS = 256
END = "<|endoftext|>"
SEED = 1234


def write_base_model(texts: Sequence[str], folder: Path) -> int:
    """Train a byte-level BPE on ``texts``, draw a model's weights, and write both; returns the number of weights."""
    # transformers takes seconds to import, and the first line on the screen should not wait for it.
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END).save_pretrained(folder)
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=MAX_TOKENS,
            tie_word_embeddings=False,
            bos_token_id=bpe.token_to_id(END),
            eos_token_id=bpe.token_to_id(END),
            initializer_range=0.05,
        )
    )
    model.save_pretrained(folder)
    return sum(weight.numel() for weight in model.parameters())
