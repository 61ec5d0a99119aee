# SPDX-License-Identifier: Apache-2.0
"""Conversations as data files write them. Knows fields; knows no tokens."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_aligner.data.records import text_field
from nemo_aligner.data.row_files import keys_of, shorten
from nemo_aligner.data.tokenizer import Message, Tools
from nemo_aligner.errors import UserError

_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_SPEAKERS = {"user": "User", "assistant": "Assistant"}  # what NeMo calls them
LEARNED_KEYS = ("weight", "train")  # say whether a message is learned


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One speaker's turn."""

    speaker: str  # "User" or "Assistant" as a rule; with prompt tokens any name
    text: str  # empty where a message has only tool calls
    label: str | None = None  # attributes of the turn, e.g. "quality:4,toxicity:0"
    message: Message | None = None  # the whole message, where a row of messages wrote it
    trained: bool = True  # False: the row says that this turn is not learned


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A conversation."""

    system: str  # may be empty
    turns: tuple[Turn, ...]  # at least one is learned, unless the row says otherwise
    mask: str  # the speaker whose turns are not learned
    kind: str | None  # VALUE_TO_TEXT: labels before the text; TEXT_TO_VALUE: after it; None: not shown
    opening: Message | None = None  # the system message, where a row of messages wrote it
    tools: Tools = None  # JSON schemas of the functions that may be called

    def learned(self, index: int) -> bool:
        """True if a turn is learned. One that nothing leads to is context only, unless labels are predicted from it."""
        turn = self.turns[index]
        led = index > 0 or self.opening is not None or self.kind == "TEXT_TO_VALUE"
        return turn.trained and self._speaks(turn) and led

    def _speaks(self, turn: Turn) -> bool:
        if turn.message is not None:
            return turn.message["role"] == "assistant"
        return turn.speaker != self.mask

    @property
    def messages(self) -> list[Message]:
        """The conversation as chat templates read it; a system text comes first and is no turn."""
        opening = [{"role": "system", "content": self.system}] if self.system else []
        if self.opening is not None:
            opening = [self.opening]
        return opening + [turn.message or _as_message(turn) for turn in self.turns]

    @property
    def masked(self) -> bool:
        """True if nothing is learned, as the row itself says."""
        return not any(self.learned(index) for index in range(len(self.turns)))


def _as_message(turn: Turn) -> Message:
    roles = {speaker: role for role, speaker in _SPEAKERS.items()}
    return {"role": roles.get(turn.speaker, turn.speaker), "content": turn.text}


def read_chat(row: Mapping[str, object]) -> Chat:
    """A conversation in either layout: {system, conversations, mask, type} or {messages: [{role, content}]}.

    Raises:
        UserError: a key is missing or has the wrong type, or no turn would be learned.
    """
    chat = (
        _read_messages(row) if "messages" in row and "conversations" not in row else _read_conversations(row)
    )
    if chat.masked and all(turn.trained for turn in chat.turns):
        raise UserError(
            f"no turn is learned: speakers {[turn.speaker for turn in chat.turns]}, mask {chat.mask!r}, "
            "and the first turn is context only",
            fix="let a response follow the first turn, or remove the line",
        )
    return chat


def is_trained(entry: Mapping[str, object]) -> bool:
    """True if a row or message is learned, as its ``weight`` (1 or 0) and ``train`` (true or false) say.

    Raises:
        UserError: one of them has another value.
    """
    flags = {name: entry[name] for name in LEARNED_KEYS if entry.get(name) is not None}
    for name, value in flags.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise UserError(
                f"key {name!r} has the value {shorten(value)}: a row or turn is learned or it is not",
                fix=f"set {name!r} to 1 or 0, or remove it",
            )
    return all(bool(value) for value in flags.values())


def _read_conversations(row: Mapping[str, object]) -> Chat:
    whole = is_trained(row)
    turns = tuple(
        Turn(
            speaker=text_field(turn, "from"),
            text=text_field(turn, "value"),
            label=_optional_text(turn, "label"),
            trained=whole and is_trained(turn),
        )
        for turn in _objects(row, "conversations")
    )
    kind = _optional_text(row, "type")
    if kind not in (None, "VALUE_TO_TEXT", "TEXT_TO_VALUE"):
        raise UserError(f"key 'type' is {kind!r}", fix="use VALUE_TO_TEXT, TEXT_TO_VALUE or null")
    mask = _optional_text(row, "mask") or "User"
    speakers = sorted({turn.speaker for turn in turns})
    if mask not in speakers:
        raise UserError(
            f"key 'mask' is {mask!r}, but the speakers are {speakers}", fix="name the speaker to mask"
        )
    return Chat(
        system=_optional_text(row, "system") or "", turns=turns, mask=mask, kind=kind, tools=read_tools(row)
    )


def _read_messages(row: Mapping[str, object]) -> Chat:
    whole = is_trained(row)
    messages = read_messages(row, "messages")
    turns = [
        Turn(
            speaker=_SPEAKERS.get(str(message["role"]), str(message["role"])),
            text=message.get("content", ""),
            message=message,
            trained=whole and _message_is_trained(entry),
        )
        for entry, message in zip(_objects(row, "messages"), messages, strict=True)
    ]
    opening = turns.pop(0).message if turns[0].speaker == "system" else None
    return Chat(
        system=opening.get("content", "") if opening else "",
        turns=tuple(turns),
        mask="User",
        kind=None,
        opening=opening,
        tools=read_tools(row),
    )


def read_messages(row: Mapping[str, object], key: str) -> list[Message]:
    """The messages under ``key``, with all that a chat template may read of them.

    Content that is written as a list of text parts is joined; keys whose value is null are left out, as
    transformers leaves them out.

    Raises:
        UserError: there are none, or one has no role that is known or nothing to say.
    """
    entries = row.get(key)
    if not (isinstance(entries, list) and entries and all(isinstance(entry, dict) for entry in entries)):
        raise UserError(
            f"key {key!r} holds no list of messages: {shorten(entries)}",
            fix='write [{"role": "user", "content": "..."}]',
        )
    return [_read_message(entry) for entry in entries]


def _read_message(entry: Mapping[str, object]) -> Message:
    role = text_field(entry, "role")
    if role not in _ROLES:
        raise UserError(f"a message has the role {role!r}", fix=f"use one of {', '.join(_ROLES)}")
    message: Message = {
        name: value for name, value in entry.items() if value is not None and name not in LEARNED_KEYS
    }
    says_more = role == "assistant" and len(message) > 1 and "content" not in message
    if isinstance(entry.get("content"), list):
        message["content"] = _joined(entry["content"])
    elif not says_more:
        message["content"] = text_field(entry, "content")
    for name in ("reasoning_content", "reasoning", "thinking", "name"):
        if name in message:
            text_field(message, name)
    if "tool_calls" in message:
        _objects(message, "tool_calls", empty=True)
    return message


def _message_is_trained(entry: Mapping[str, object]) -> bool:
    trained = is_trained(entry)
    asked = [name for name in LEARNED_KEYS if entry.get(name) is not None]
    if trained and asked and entry["role"] != "assistant":
        raise UserError(
            f"key {asked[0]!r} of a message would have the role {entry['role']!r} learned, and only the "
            "assistant's turns are",
            fix=f"remove {asked[0]!r} from this message, or set it to 0",
        )
    return trained


def _joined(parts: object) -> str:
    assert isinstance(parts, list)
    texts = []
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise UserError(
                f"key 'content' has the value {shorten(parts)}: only parts of text are read",
                fix='give \'content\' a string, or parts {"type": "text", "text": "..."}',
            )
        texts.append(part["text"])
    return "".join(texts)


def read_tools(row: Mapping[str, object]) -> Tools:
    """The functions that the row offers under ``tools``, written as a list or as JSON text; None where there are none.

    Raises:
        UserError: it is something else.
    """
    value = row.get("tools")
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"key 'tools' has the value {shorten(value)}, which is no JSON",
                fix="give 'tools' a list of JSON schemas",
            ) from error
    if not value:
        return None
    return [dict(tool) for tool in _objects({"tools": value}, "tools")]


def _optional_text(row: Mapping[str, object], key: str) -> str | None:
    return None if row.get(key) is None else text_field(row, key)


def _objects(row: Mapping[str, object], key: str, *, empty: bool = False) -> list[Mapping[str, Any]]:
    if key not in row:
        raise UserError(
            f"key {key!r} is missing; the row has {keys_of(row)}",
            fix="give each row 'conversations' or 'messages', or set model.data.chat=False",
        )
    value = row[key]
    if not (isinstance(value, list) and (value or empty) and all(isinstance(entry, dict) for entry in value)):
        raise UserError(
            f"key {key!r} has the value {shorten(value)}", fix=f"give {key!r} a list of JSON objects"
        )
    return value
