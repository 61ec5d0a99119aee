# SPDX-License-Identifier: Apache-2.0
"""Rows as public data sets write them, brought to the forms that the readers know. Knows names of fields, no tokens.

Nothing that carries meaning is dropped: what no form has a place for is refused by its key.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_aligner.data.dolly import dolly_to_prompt_response, is_dolly
from nemo_aligner.data.records import text_field
from nemo_aligner.data.row_files import keys_of, shorten
from nemo_aligner.data.squad import is_squad, squad_prompt, squad_to_prompt_response
from nemo_aligner.errors import UserError

_LOG = logging.getLogger(__name__)

CHATS = ("messages", "conversations", "conversation")  # the keys of a conversation, as data sets call it
PROMPTS = ("prompt", "question", "problem", "query")  # the keys of a text that asks
_RESPONSES = {
    "prompt": ("completion", "response"),
    "question": ("answer", "response"),
    "problem": ("solution", "answer", "generated_solution"),
    "query": ("response", "answer"),
}
# Keys that change what a row means. A row that has one is read by a form that knows it, or refused.
_MEANINGFUL = frozenset((
    "instruction", "system", "tools", "functions", "tool_calls", "function_call", "reasoning_content", "history",
    "weight", "train", "images", "image", "videos", "audios",
))  # fmt: skip
_FLAGS = ("weight", "train")  # whether a row is learned, where rows are
_ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function_response", "function-response"), "tool"),
}
# Stanford Alpaca's own words.
_ALPACA = "Below is an instruction that describes a task. "
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
)
_ALPACA_ASKS = "Write a response that appropriately completes the request."

JsonRow = Mapping[str, object]


@dataclass
class Recognised:
    """Says once of a file in what form its rows are and how they are read."""

    path: str | Path
    quiet: bool = False  # say nothing, as somebody else will
    _said: set[str] = field(default_factory=set)

    def say(self, form: str, how: str) -> None:
        """Log the form, unless it has been."""
        if form not in self._said and not self.quiet:
            self._said.add(form)
            _LOG.info("%s holds %s: read as %s", self.path, form, how)


def refuse_unread(row: JsonRow, *, read: Collection[str], fix: str) -> None:
    """Raise UserError for a key that changes the meaning of a row and is not among those ``read``.

    Raises:
        UserError: naming key and value; ``fix`` says where such keys belong.
    """
    for key in sorted(_MEANINGFUL & row.keys() - set(read)):
        value = row[key]
        is_idle = value is True if key == "train" else key == "weight" and value == 1 and value is not True
        if not (is_idle or value is None or value in ("", [], {})):
            raise UserError(
                f"key {key!r} has the value {shorten(value)}, which changes what the row means, and is not read",
                fix=f"{fix}, or remove {key!r} from the row",
            )


def as_input_output(row: JsonRow, *, keys: Sequence[str], recognised: Recognised) -> JsonRow:
    """A row of a prompt and its response as one that has ``keys``, those of the prompt template.

    Args:
        row: as the file has it.
        keys: what the template names; {input, output} by default, to which common forms are converted.
        recognised: logs the form.

    Raises:
        UserError: a key that carries meaning would be dropped, or a field is no string.
    """
    if converted := _converted(row, keys, recognised):
        return converted
    if row.keys() >= set(keys):
        fix = "name it in prompt_template, write the row as messages with model.data.chat=True"
        refuse_unread(row, read=(*keys, *_FLAGS), fix=fix)
    return row


def _converted(row: JsonRow, keys: Sequence[str], recognised: Recognised) -> JsonRow | None:
    if "output" not in keys or not set(keys) <= {"input", "output", "category"}:
        return None
    is_plain = row.keys() >= set(keys)
    fix = "name it in prompt_template"
    if is_dolly(row) and not is_plain:
        recognised.say("raw Dolly rows", "examples/nlp/data/dolly/preprocess.py converts them")
        refuse_unread(row, read=("instruction", *_FLAGS), fix=fix)
        return dolly_to_prompt_response(row)
    if is_squad(row) and not is_plain:
        recognised.say("SQuAD's rows", "{input, output}, the context in the input")
        refuse_unread(row, read=_FLAGS, fix=fix)
        return squad_to_prompt_response(row)
    if "output" in row and row.get("instruction"):
        recognised.say(
            "rows of {instruction, input, output}", "Alpaca's: its instruction and input in its own prompt"
        )
        refuse_unread(row, read=("instruction", *_FLAGS), fix=fix)
        return {"input": alpaca_prompt(row), "output": row["output"]}
    if is_plain or not (pair := _pair(row)):
        return None
    prompt, response = pair
    recognised.say(f"rows of {{{prompt}, {response}}}", "{input, output}")
    refuse_unread(row, read=(*pair, *_FLAGS), fix=fix)
    return {"input": row[prompt], "output": row[response]}


def _pair(row: JsonRow) -> tuple[str, str] | None:
    """The row's keys of prompt and response; UserError where there are two of them."""
    found = [(key, name) for key in PROMPTS if key in row for name in _RESPONSES[key] if name in row]
    if len(found) > 1:
        raise UserError(
            f"the row has {keys_of(row)}: which of them are the prompt and its response?",
            fix=f'name them: prompt_template="{{{found[0][0]}}} {{{found[0][1]}}}" label_key={found[0][1]} '
            f"truncation_field={found[0][0]}",
        )
    return found[0] if found else None


def alpaca_prompt(row: JsonRow) -> str:
    """Alpaca's prompt of {instruction, input}, where input may be missing or empty."""
    instruction = text_field(row, "instruction")
    given = "" if row.get("input") is None else text_field(row, "input")
    if not given:
        return f"{_ALPACA}{_ALPACA_ASKS}\n\n### Instruction:\n{instruction}\n\n### Response:"
    return f"{_ALPACA_INPUT}{_ALPACA_ASKS}\n\n### Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:"


def prompt_of(row: JsonRow, recognised: Recognised) -> str | Sequence[JsonRow]:
    """The prompt of a row: a text, or the entries of a conversation whose next turn is the assistant's.

    Raises:
        UserError: it asks nothing, or for more than one thing, or a key that carries meaning would be dropped.
    """
    fix = "write it into the prompt, or into messages"
    for key in (*CHATS, "prompt"):
        if isinstance(row.get(key), list):
            recognised.say(
                f"rows of {{{key}: [...]}}", "conversations, laid out by the tokenizer's chat template"
            )
            refuse_unread(row, read=(key, "system", "tools"), fix=fix)
            return entries_of(row, key)
    if "text" in row:
        refuse_unread(row, read=("text",), fix=fix)
        return text_field(row, "text")
    if is_dolly(row):
        recognised.say("raw Dolly rows", "examples/nlp/data/dolly/preprocess.py converts them")
        refuse_unread(row, read=("instruction",), fix=fix)
        return dolly_to_prompt_response(row)["input"]
    if is_squad(row):
        recognised.say("SQuAD's rows", "{text}, the context in it")
        refuse_unread(row, read=(), fix=fix)
        return squad_prompt(row)
    if row.get("instruction"):
        recognised.say("rows of {instruction, input}", "Alpaca's: in its own prompt")
        refuse_unread(row, read=("instruction",), fix=fix)
        return alpaca_prompt(row)
    found = [key for key in PROMPTS if key in row]
    if not found:
        raise UserError(
            f"key 'text' is missing; the row has {keys_of(row)}",
            fix='give the row "text", "prompt" or "messages"',
        )
    recognised.say(f"rows of {{{found[0]}}}", "{text}")
    refuse_unread(row, read=found[:1], fix=fix)
    return text_field(row, found[0])


def entries_of(row: JsonRow, key: str) -> list[JsonRow]:
    """The messages under ``key`` as {role, content}, in whichever of the two dialects they are written.

    ShareGPT's entries are {from, value}. A row's own ``system`` text becomes the first message.

    Raises:
        UserError: the value is no list of JSON objects, or a speaker is not known.
    """
    value = row[key]
    entries = [entry for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, dict)]
    if not entries or len(entries) != len(value if isinstance(value, list) else [value]):
        raise UserError(
            f"key {key!r} has the value {shorten(value)}",
            fix='write messages: [{"role": "user", "content": "..."}, ...]',
        )
    messages = [_entry(entry) for entry in entries]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": text_field(row, "system")})
    return messages


def _entry(entry: JsonRow) -> JsonRow:
    if "role" in entry or "from" not in entry:
        return entry
    speaker = text_field(entry, "from")
    if speaker.lower() not in _ROLES:
        raise UserError(f"key 'from' is {shorten(speaker)!r}", fix=f"use one of {', '.join(_ROLES)}")
    others = {name: value for name, value in entry.items() if name not in ("from", "value")}
    return {**others, "role": _ROLES[speaker.lower()], "content": entry.get("value")}


def messages_row(row: JsonRow, recognised: Recognised) -> JsonRow:
    """A row that is to be read as a conversation, with it under ``messages`` unless NeMo's own form says more.

    Raises:
        UserError: a key that carries meaning would be dropped.
    """
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        recognised.say(
            "rows of {prompt: [...], completion: [...]}", "conversations whose completion is learned"
        )
        context = [{**entry, "train": False} for entry in entries_of(row, "prompt")]
        return _with_messages(row, [*context, *entries_of({"completion": row["completion"]}, "completion")])
    key = next((key for key in CHATS if key in row), None)
    if key is None:
        return _as_two_turns(row, recognised)
    if key == "messages" or (key == "conversations" and _is_nemo(row)):
        return row
    recognised.say(f"rows of {{{key}: [...]}}", "messages of user, assistant, system and tool")
    return _with_messages(row, entries_of(row, key))


def _is_nemo(row: JsonRow) -> bool:
    """NeMo's own form names whom to mask or the kind of its labels, or its speakers are not ShareGPT's."""
    entries = row["conversations"]
    if row.get("mask") or row.get("type") or not isinstance(entries, list):
        return True
    speakers = [entry.get("from", entry.get("role")) for entry in entries if isinstance(entry, dict)]
    return any(
        str(speaker) in ("User", "Assistant") or str(speaker).lower() not in _ROLES for speaker in speakers
    )


def _as_two_turns(row: JsonRow, recognised: Recognised) -> JsonRow:
    if is_dolly(row):
        fields: JsonRow = dolly_to_prompt_response(row)
        form = "{instruction, context, response}"
    elif is_squad(row):
        fields, form = squad_to_prompt_response(row), "{context, question, answers}"
    elif row.get("instruction") and "output" in row:
        parts = [text_field(row, "instruction"), "" if row.get("input") is None else text_field(row, "input")]
        fields = {"input": "\n\n".join(part for part in parts if part), "output": row["output"]}
        form = "{instruction, input, output}"
    elif {"input", "output"} <= row.keys():
        fields, form = row, "{input, output}"
    elif pair := _pair(row):
        fields, form = {"input": row[pair[0]], "output": row[pair[1]]}, f"{{{pair[0]}, {pair[1]}}}"
    else:
        return row
    recognised.say(f"rows of {form}", "conversations of two turns")
    refuse_unread(row, read=("instruction", "system", "tools", "weight", "train"), fix="write it as messages")
    turns = [{"role": "user", "content": text_field(fields, "input")},
             {"role": "assistant", "content": text_field(fields, "output")}]  # fmt: skip
    system = [{"role": "system", "content": text_field(row, "system")}] if row.get("system") else []
    return _with_messages(row, [*system, *turns])


def _with_messages(row: JsonRow, messages: Sequence[JsonRow]) -> dict[str, Any]:
    kept = {key: row[key] for key in ("tools", "weight", "train") if key in row}
    return {**kept, "messages": list(messages)}
