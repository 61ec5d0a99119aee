# SPDX-License-Identifier: Apache-2.0
"""Tokenizer settings of a reward model's export: padding, and the tokens around a text.

transformers reads a reward at the last token that is not padding, so padding is a token that ends no text.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_aligner.checkpoint.stop_tokens import stop_ids
from nemo_aligner.checkpoint.tokenizer_files import as_folder, find_tokenizer_files
from nemo_aligner.data.reading import Reading
from nemo_aligner.data.row import TextEncoder
from nemo_aligner.data.tokenizer import Tokenizer, load_with_transformers

PAD = "<|pad|>"
_UNUSED = re.compile(r"pad|reserved|unused", re.IGNORECASE)
# characters of no language: what does not know them writes its unknown token
_STRANGE = "\ue000\u0378\U0010fffd"
_PROBES = ("Is it lit?", " two  spaces\n", "naïve 你好 12")
_OLD_FILES = ("special_tokens_map.json", "added_tokens.json")  # tokenizer_config.json says the same

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RewardTokens:
    """The changes to the tokenizer of a reward model's export."""

    files: dict[str, Path | bytes]  # the tokenizer's
    settings: dict[str, int]  # of config.json
    vocab_size: int  # one more than the model's where no token of it can be padding


def reward_tokens(
    config: Mapping[str, Any], files: Mapping[str, Path | bytes], tokenizer: Tokenizer | None
) -> RewardTokens:
    """A padding token, and a tokenizer that puts BOS and EOS where the model was trained to see them.

    Args:
        config: model_config.yaml.
        files: the tokenizer's, by their names in a Hugging Face folder.
        tokenizer: the one that they make; None where there is none, and nothing changes.
    """
    vocab = int(config["vocab_size"])
    unchanged = RewardTokens(files=dict(files), settings={}, vocab_size=vocab)
    if tokenizer is None:
        _log.warning(
            "the model has no tokenizer: set pad_token_id in config.json to an id that no text ends with"
        )
        return unchanged
    with as_folder({**files, "config.json": b'{"model_type": "llama"}'}) as folder:
        theirs: Any = load_with_transformers(folder)
        pad = _pad_id(config, theirs, tokenizer)
        if pad is None:
            theirs.add_special_tokens({"pad_token": PAD})
            pad = int(theirs.pad_token_id)
        theirs.pad_token = theirs.convert_ids_to_tokens(pad)
        reading = Reading.of(config) or Reading()
        encode = TextEncoder(tokenizer=tokenizer, add_bos=reading.add_bos, append_eos=reading.append_eod)
        saved = _saved(theirs, encode, folder / "saved")
    kept = {name: content for name, content in files.items() if name not in _OLD_FILES}
    known = {"pad_token_id": pad, "eos_token_id": tokenizer.eos_id, "bos_token_id": tokenizer.bos_id}
    return replace(
        unchanged,
        files={**kept, **saved},
        settings={name: value for name, value in known.items() if value is not None},
        vocab_size=max(vocab, pad + 1),
    )


def _pad_id(config: Mapping[str, Any], theirs: Any, tokenizer: Tokenizer) -> int | None:  # noqa: ANN401
    """A token of the vocabulary that ends no text: the model's own padding, one that is reserved, or the unknown one
    where the tokenizer never writes it.
    """
    ends = {*stop_ids(config, tokenizer), tokenizer.bos_id}
    kept = (config.get("huggingface") or {}).get("config") or {}
    added = {i: str(token) for i, token in sorted(theirs.added_tokens_decoder.items())}
    candidates = [kept.get("pad_token_id"), theirs.pad_token_id]
    candidates += [i for i, text in added.items() if _UNUSED.search(text)]
    if theirs.unk_token_id is not None and theirs.unk_token_id not in tokenizer.encode(_STRANGE):
        candidates.append(theirs.unk_token_id)
    return next(
        (i for i in candidates if type(i) is int and 0 <= i < tokenizer.vocab_size and i not in ends), None
    )


def _saved(theirs: Any, encode: TextEncoder, folder: Path) -> dict[str, bytes]:  # noqa: ANN401
    """Its files, once it writes what ``encode`` does; said where it cannot."""
    if not _agree(theirs, encode):
        bos = encode.tokenizer.adds_bos if encode.add_bos is None else encode.add_bos
        for name, value in (("add_bos_token", bos), ("add_eos_token", encode.append_eos)):
            setattr(theirs, name, value)
            theirs.init_kwargs[name] = value
    theirs.save_pretrained(folder)
    if not _agree(load_with_transformers(folder), encode):
        _log.warning(
            "transformers' tokenizer of this model writes other tokens than ours: give the exported model the ids that "
            "were trained, with append_eod=%s and add_bos=%s",
            *(encode.append_eos, encode.add_bos),
        )
    return {name: path.read_bytes() for name, path in find_tokenizer_files(folder).items()}


def _agree(theirs: Any, encode: TextEncoder) -> bool:  # noqa: ANN401
    return all(list(theirs(text)["input_ids"]) == encode(text) for text in _PROBES)
