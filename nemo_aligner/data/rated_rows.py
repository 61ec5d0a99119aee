# SPDX-License-Identifier: Apache-2.0
"""Files of responses that are good or bad, each by itself. Knows no tokens."""

from collections.abc import Mapping
from pathlib import Path

from nemo_aligner.data.common_rows import CHATS, refuse_unread
from nemo_aligner.data.message_rows import conversation_of, render_response
from nemo_aligner.data.records import RecordFile, Records, TextRow, text_field
from nemo_aligner.data.row_files import keys_of, shorten
from nemo_aligner.data.text_rows import is_finite_number
from nemo_aligner.data.tokenizer import Tokenizer
from nemo_aligner.errors import UserError

_PREFERENCES = {"chosen": 1.0, "rejected": 0.0}


def open_rated(path: str | Path, tokenizer: Tokenizer | None = None) -> Records[TextRow]:
    """The rows {prompt, response, label} of a file: a response each, whose reward is above 0 where it is good.

    ``completion`` may stand for ``response``, and one list ``messages`` for prompt and response; for ``label``, true or
    false, NeMo-Aligner's ``preference``, "chosen" or "rejected", or a number ``reward``, where above 0 is good. Prompt
    and response may be messages, which the chat template lays out.

    Raises:
        UserError: the file or a line cannot be read.
    """
    return RecordFile(path, lambda row: _read_messages(row, tokenizer) if _has_messages(row) else _read(row))


def check_first_rated(path: str | Path, *, most: int) -> None:
    """Read the first rows of a file as ``open_rated`` will; messages are left to it, as they need a tokenizer.

    Raises:
        UserError: the file or a row cannot be read.
    """
    RecordFile(path, lambda row: _rating(row) if _has_messages(row) else _read(row), most=most)


def _has_messages(row: Mapping[str, object]) -> bool:
    return any(isinstance(row.get(key), list | dict) for key in ("prompt", "response", "completion", *CHATS))


def _response_key(row: Mapping[str, object]) -> str:
    return "completion" if "completion" in row else "response"


def _read(row: Mapping[str, object]) -> TextRow:
    refuse_unread(row, read=(), fix="write it into the prompt, or write the row as messages")
    prompt, response = text_field(row, "prompt"), text_field(row, _response_key(row))
    for name, text in (("prompt", prompt), (_response_key(row), response)):
        if not text:
            raise UserError(f"key {name!r} is empty", fix=f"give the row a {name}, or remove it")
    return TextRow(prompt=prompt, responses=(response,), rewards=(_rating(row),), extras=row)


def _read_messages(row: Mapping[str, object], tokenizer: Tokenizer | None) -> TextRow:
    refuse_unread(row, read=("system", "tools"), fix="write it as messages")
    prompt, response = render_response(tokenizer, conversation_of(row, _response_key(row)), row)
    return TextRow(prompt=prompt, responses=(response,), rewards=(_rating(row),), rendered=True, extras=row)


def _rating(row: Mapping[str, object]) -> float:
    keys = [key for key in ("label", "preference", "reward") if key in row]
    if len(keys) > 1:
        raise UserError(
            f"the row has {keys[0]!r} and {keys[1]!r}: which of them says if its response is good?",
            fix=f"remove {keys[1]!r} from the row, or {keys[0]!r}",
        )
    given = keys[0] if keys else None
    match row:
        case {"label": bool(good)}:
            return float(good)
        case {"preference": str(word)} if word in _PREFERENCES:
            return _PREFERENCES[word]
        case {"reward": int() | float() as reward} if is_finite_number(reward):
            return float(reward)
    raise UserError(
        f"key {given!r} is {shorten(row[given])}"
        if given
        else f"no key says if the response is good: {keys_of(row)}",
        fix='give the row "label": true or false, "preference": "chosen" or "rejected", or a number "reward"',
    )
