# SPDX-License-Identifier: Apache-2.0
"""Rows that ask a model for a response: {"text": ...}, {"prompt": ...} or {"messages": [{"role", "content"}, ...]}."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nemo_aligner.data.common_rows import PROMPTS, Recognised, prompt_of, refuse_unread
from nemo_aligner.data.conversations import read_messages, read_tools
from nemo_aligner.data.records import RecordFile, text_field
from nemo_aligner.data.rendering import render_prompt
from nemo_aligner.data.row import Row, split_bos
from nemo_aligner.data.row_files import keys_of
from nemo_aligner.data.tokenizer import Message, Tokenizer, Tools
from nemo_aligner.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """A prompt or a conversation that a response is generated for."""

    prompt: str | list[Message]  # text that goes on, or a conversation whose next turn is the assistant's
    tools: Tools = None  # JSON schemas of the functions that may be called
    row: Mapping[str, object] = field(default_factory=dict)  # the JSON object that it stands in


def open_requests(path: str | Path) -> RecordFile[GenerateRequest]:
    """The requests of a JSONL file; UserError where a line is none."""
    return RecordFile(path, read_request)


def read_request(row: Mapping[str, object]) -> GenerateRequest:
    """The request of a row; ``prompt`` may also hold the list that ``messages`` holds, or be called a question.

    Raises:
        UserError: none of the keys is there, its value has the wrong type, or a key beside a text carries
            meaning.
    """
    for key in ("messages", *PROMPTS, "text"):
        if key in row:
            is_chat = key == "messages" or isinstance(row[key], list)
            if is_chat:
                return GenerateRequest(prompt=read_messages(row, key), tools=read_tools(row), row=row)
            refuse_unread(row, read=("weight", "train"), fix='write the request as "messages", with roles')
            return GenerateRequest(prompt=text_field(row, key), row=row)
    raise UserError(
        f"the row asks for nothing: it has {keys_of(row)}", fix='give it "text", "prompt" or "messages"'
    )


def tokens_of(prompt: str | Sequence[Message], tokenizer: Tokenizer, *, tools: Tools = None) -> list[int]:
    """The tokens of a prompt, as they stand before a response in training: a text's with BOS as the tokenizer has it.

    Raises:
        UserError: a conversation, and the tokenizer has no chat template, or it refuses or drops something of it.
    """
    if not isinstance(prompt, str):
        # The template writes BOS where the model wants it.
        return tokenizer.encode(render_prompt(tokenizer, prompt, tools))
    pieces = [tokenizer.encode(prompt)]
    return [*split_bos(pieces, tokenizer=tokenizer, add_bos=None), *pieces[0]]


def plain_prompt(row: Row) -> str:
    """A prompt in plain words: its text, or what its messages say, without the marks of a chat template."""
    asked = prompt_of(row.extras, Recognised("", quiet=True))
    if isinstance(asked, str):
        return row.text
    messages = read_messages({"messages": list(asked)}, "messages")
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
