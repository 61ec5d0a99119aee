# SPDX-License-Identifier: Apache-2.0
"""Conversations as data files write them. Knows fields; knows no tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

from nemo_aligner.data.records import text_field
from nemo_aligner.data.row_files import keys_of, shorten
from nemo_aligner.errors import UserError

__all__ = ["Chat", "Turn", "read_chat"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One speaker's turn."""

    speaker: str  # "User" or "Assistant" as a rule; with prompt tokens any name
    text: str
    label: str | None = None  # attributes of the turn, e.g. "quality:4,toxicity:0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A conversation."""

    system: str  # may be empty
    turns: tuple[Turn, ...]  # at least one is learned, see ``learned``
    mask: str  # the speaker whose turns are not learned
    kind: str | None  # VALUE_TO_TEXT: labels before the text; TEXT_TO_VALUE: after it; None: not shown

    def learned(self, index: int) -> bool:
        """Whether a turn is learned. The first one is context only, unless labels are predicted from it."""
        return self.turns[index].speaker != self.mask and (index > 0 or self.kind == "TEXT_TO_VALUE")


def read_chat(row: Mapping[str, object]) -> Chat:
    """A conversation in either layout: {system, conversations, mask, type} or {messages: [{role, content}]}.

    Raises:
        UserError: a key is missing or has the wrong type, or no turn would be learned.
    """
    chat = (
        _read_messages(row) if "messages" in row and "conversations" not in row else _read_conversations(row)
    )
    if not any(chat.learned(index) for index in range(len(chat.turns))):
        raise UserError(
            f"no turn is learned: speakers {[turn.speaker for turn in chat.turns]}, mask {chat.mask!r}, "
            "and the first turn is context only",
            cure="let an answer follow the first turn, or remove the line",
        )
    return chat


def _read_conversations(row: Mapping[str, object]) -> Chat:
    turns = tuple(
        Turn(
            speaker=text_field(turn, "from"),
            text=text_field(turn, "value"),
            label=_optional_text(turn, "label"),
        )
        for turn in _objects(row, "conversations")
    )
    kind = _optional_text(row, "type")
    if kind not in (None, "VALUE_TO_TEXT", "TEXT_TO_VALUE"):
        raise UserError(f"key 'type' is {kind!r}", cure="use VALUE_TO_TEXT, TEXT_TO_VALUE or null")
    mask = _optional_text(row, "mask") or "User"
    speakers = sorted({turn.speaker for turn in turns})
    if mask not in speakers:
        raise UserError(
            f"key 'mask' is {mask!r}, but the speakers are {speakers}", cure="name the speaker to mask"
        )
    return Chat(system=_optional_text(row, "system") or "", turns=turns, mask=mask, kind=kind)


def _read_messages(row: Mapping[str, object]) -> Chat:
    speakers = {"user": "User", "assistant": "Assistant"}
    messages = [
        (text_field(entry, "role"), text_field(entry, "content")) for entry in _objects(row, "messages")
    ]
    system = messages.pop(0)[1] if messages[0][0] == "system" else ""
    for role, _ in messages:
        if role not in speakers:
            raise UserError(
                f"key 'messages' has the role {role!r} after its first entry"
                if role == "system"
                else f"key 'messages' has the role {role!r}",
                cure="use user and assistant, and system for the first message only",
            )
    turns = tuple(Turn(speaker=speakers[role], text=text) for role, text in messages)
    return Chat(system=system, turns=turns, mask="User", kind=None)


def _optional_text(row: Mapping[str, object], key: str) -> str | None:
    return None if row.get(key) is None else text_field(row, key)


def _objects(row: Mapping[str, object], key: str) -> list[Mapping[str, object]]:
    if key not in row:
        raise UserError(
            f"key {key!r} is missing; the row has {keys_of(row)}",
            cure="give each row 'conversations' or 'messages', or set model.data.chat=False",
        )
    value = row[key]
    if not (isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value)):
        raise UserError(
            f"key {key!r} has the value {shorten(value)}", cure=f"give {key!r} a list of JSON objects"
        )
    return value
