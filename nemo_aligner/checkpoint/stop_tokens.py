# SPDX-License-Identifier: Apache-2.0
"""The tokens at which a model's texts end, as its checkpoint knows them."""

import logging
from collections.abc import Mapping
from typing import Any

from nemo_aligner.checkpoint.nemo_config import block
from nemo_aligner.data.tokenizer import Message, Tokenizer, encode_after
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.config_types import check_types

_RESPONSE = "Fine."
_CHAT: list[Message] = [
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": _RESPONSE},
]

_log = logging.getLogger(__name__)


def stop_ids(config: Mapping[str, Any], tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The ids of generation_config's eos_token_id, of the tokenizer's EOS and of the chat template's end of a turn.

    Args:
        config: model_config.yaml; where it keeps no generation_config, config.json's eos_token_id counts, as in
            transformers.
        tokenizer: the model's; None where it has none.

    Raises:
        UserError: eos_token_id is neither an id nor a list of ids.
    """
    ids = _stored_ids(config)
    if tokenizer is not None:
        ids.append(tokenizer.eos_id)
        if (end := end_of_turn(tokenizer)) is not None:
            ids.append(end)
    return tuple(dict.fromkeys(ids))


def _stored_ids(config: Mapping[str, Any]) -> list[int]:
    kept = block(config, "huggingface")
    for name in ("generation_config", "config"):
        found = block(kept, name).get("eos_token_id")
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if wrong := [i for i in ids if type(i) is not int]:
            raise UserError(
                f"huggingface.{name}.eos_token_id={found} in model_config.yaml: {wrong[0]!r} is no token id",
                fix="correct eos_token_id in generation_config.json, or in config.json, and import the model again",
            )
        # Some files have -1 where there is none; what is not in the vocabulary is never written.
        check_types({"vocab_size": config.get("vocab_size")}, GPTConfig, where="model_config.yaml")
        return [i for i in ids if 0 <= i < config["vocab_size"]]
    return []


def with_stops(config: Mapping[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """``config`` whose generation_config ends texts where we do; unchanged where it does already."""
    ids, kept = stop_ids(config, tokenizer), block(config, "huggingface")
    if set(ids) == set(_stored_ids(config)):
        return dict(config)
    generation = block(kept, "generation_config") | {"eos_token_id": ids[0] if len(ids) == 1 else list(ids)}
    return {**config, "huggingface": {**kept, "generation_config": generation}}


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The token that the chat template writes after an assistant's turn; None where it is no token of its own."""
    if tokenizer.chat_template is None:
        return None
    try:
        text = tokenizer.render_chat(_CHAT)
    except UserError as error:
        _log.info("the chat template shows no end of a turn: %s", error.problem)
        return None
    _, found, after = text.rpartition(_RESPONSE)
    ids = encode_after(tokenizer, after.strip()) if found else []
    return ids[0] if ids and (ids[0] in tokenizer.added_ids or len(ids) == 1) else None
