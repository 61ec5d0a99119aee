# SPDX-License-Identifier: Apache-2.0
"""The tokenizer in a GGUF file's metadata, rebuilt as the files of a Hugging Face fast tokenizer."""

import json
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_log = logging.getLogger(__name__)


def build_tokenizer_files(metadata: dict[str, Any], *, where: str) -> dict[str, Path | bytes]:
    """tokenizer.json, tokenizer_config.json and the chat template; empty, with a log line, where that is
    not possible.

    Args:
        metadata: the GGUF's keys and values.
        where: names the file in messages.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    pre_tokenizer = _pre_tokenizer(split)
    if kind != "gpt2" or pre_tokenizer is None:
        _log.warning("%s: a tokenizer of type %s, %s cannot be rebuilt", where, kind, split)
        return {}
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    if metadata.get("tokenizer.ggml.add_bos_token", False):
        _put_bos_first(tokenizer, tokens, metadata["tokenizer.ggml.bos_token_id"])
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {
        name: tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in named.items()
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=metadata["llama.context_length"],
        **special,
    )
    fast.chat_template = metadata.get("tokenizer.chat_template")
    with tempfile.TemporaryDirectory(prefix="nemo_aligner_") as folder:
        fast.save_pretrained(folder)
        content = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    # transformers 4 knows the class by this name only.
    settings = json.loads(content["tokenizer_config.json"]) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    return {**content, "tokenizer_config.json": json.dumps(settings, indent=2).encode()}


def _pre_tokenizer(split: str) -> "PreTokenizer | None":
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    match split:
        case "gpt-2" | "default":
            return byte_level
        case "smollm":
            return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        case "llama-bpe":
            by_pattern = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated")
            bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            return pre_tokenizers.Sequence([by_pattern, bytes_only])
    return None


def _put_bos_first(tokenizer: "Tokenizer", tokens: list[str], bos_id: int) -> None:
    from tokenizers.processors import TemplateProcessing

    bos = tokens[bos_id]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
    )
