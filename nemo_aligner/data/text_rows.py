# SPDX-License-Identifier: Apache-2.0
"""Files of prompts, of pairs of responses and of labeled responses. Knows no tokens."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_aligner.data.common_rows import (
    CHATS,
    Recognised,
    alpaca_prompt,
    entries_of,
    prompt_of,
    refuse_unread,
)
from nemo_aligner.data.config import PromptDataConfig
from nemo_aligner.data.message_rows import render_asked, render_response, split_pair
from nemo_aligner.data.records import USUAL_REWARDS, RecordFile, Records, TextRow, text_field
from nemo_aligner.data.row_files import keys_of, shorten
from nemo_aligner.data.tokenizer import Tokenizer
from nemo_aligner.errors import UserError

_LAYOUTS = (
    "write {prompt, chosen, rejected} on each line, "
    "or {text} on alternate lines: the better response, then the worse one"
)
# The names of NeMo-Aligner's DPO data, which the reader's stand for.
_NEMO_NAMES = {"chosen_response": "chosen", "rejected_response": "rejected"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseFiles:
    """How a job's files of responses are read."""

    open: Callable[[str, Tokenizer], Records[TextRow]]
    check_first: Callable[[str], None] | None = None  # reads a file's first rows, before torch is loaded
    unit: str  # what a row is called in messages, in the plural


class LinePairs:
    """Two consecutive lines of a file as one pair.

    Args:
        lines: the file.
        join: makes one row of two; its UserError is reported by whoever asks for the row.

    Raises:
        UserError: the last pair lacks a line.
    """

    def __init__(self, lines: RecordFile[TextRow], join: Callable[[TextRow, TextRow], TextRow]) -> None:
        if len(lines) % 2:
            raise UserError(
                f"{lines.where(len(lines) - 1)}: two lines make a pair, and the last of {len(lines)} has no other",
                fix="add the other response of its pair, or remove the line",
            )
        self._lines, self._join = lines, join
        self.path, self.fingerprint = lines.path, lines.fingerprint

    def __len__(self) -> int:
        return len(self._lines) // 2

    def __getitem__(self, index: int) -> TextRow:
        return self._join(self._lines[2 * index], self._lines[2 * index + 1])

    def where(self, index: int) -> str:
        """The place of a pair as messages name it, that of its first line."""
        return self._lines.where(2 * index)


def open_prompts(path: str | Path, tokenizer: Tokenizer, data: PromptDataConfig) -> Records[TextRow]:
    """The prompts of a file, of whichever form; the chat template lays out messages, and with ``data.chat`` texts.

    Raises:
        UserError: the file or a line cannot be read.
    """
    recognised = Recognised(path)
    if data.chat and tokenizer.chat_template is None:
        raise UserError(
            "model.data.chat=True, and the tokenizer has no chat template",
            fix="set model.data.chat=False, or take a model that was fine-tuned for chats",
        )

    def read(row: Mapping[str, object]) -> TextRow:
        asked = prompt_of(row, recognised)
        if isinstance(asked, str):
            text = data.wrapped(asked)
            if not data.chat:
                return TextRow(prompt=text, extras=row)
            asked = [{"role": "user", "content": text}]
        return TextRow(prompt=render_asked(tokenizer, asked, row), rendered=True, extras=row)

    return RecordFile(path, read)


def open_pairs(
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    default_rewards: tuple[float, float] = USUAL_REWARDS,
) -> Records[TextRow]:
    """The pairs of a file whose first row says how all of them are written.

    Rows are {prompt, chosen, rejected}, where a text is the prompt with the response after it, or where the three
    are messages that the chat template lays out; or {text} on alternate lines, the better response first.

    Args:
        path: the file.
        tokenizer: lays out messages; None where there are none.
        default_rewards: of the chosen and of the rejected response, where a row has no chosen_reward, rejected_reward.

    Raises:
        UserError: the file or a line cannot be read, a row is not like the first one, or a line is left over.
    """
    reader = _PairReader(path, tokenizer)
    lines = RecordFile(path, lambda row: replace(reader(row), rewards=_rewards(row, default_rewards)))
    if not reader.alternates:
        return lines
    return LinePairs(lines, _join_pair)


def _join_pair(one: TextRow, other: TextRow) -> TextRow:
    rewards = one.rewards[0], other.rewards[1]
    return replace(one, responses=(*one.responses, *other.responses), rewards=rewards)


def _rewards(row: Mapping[str, object], default: tuple[float, float]) -> tuple[float, ...]:
    found: list[float] = []
    for key, usual in zip(("chosen_reward", "rejected_reward"), default, strict=True):
        given = row.get(key)
        reward = usual if given is None else given
        if not is_finite_number(reward):
            raise UserError(
                f"key {key!r} is {shorten(reward)}", fix="give it a number, or remove it from the row"
            )
        found.append(float(reward))  # type: ignore[arg-type] - see above
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """How the rows of a file are labeled."""

    num_attributes: int  # numbers in each label
    missing: float  # stands in a label for an attribute without a number, usually -100
    paired: bool = False  # two consecutive rows are the responses to one prompt


def open_labeled(path: str | Path, tokenizer: Tokenizer | None = None, *, labels: Labels) -> Records[TextRow]:
    """The rows {"text": ..., "label": [numbers]} of a file; ``messages`` may stand in the place of ``text``.

    In pairs the first number of both labels is the preference: below 0 the first response is better, else the second;
    its size is by how much.

    Raises:
        UserError: the file or a line cannot be read, or a line is left over.
    """

    def read(row: Mapping[str, object]) -> TextRow:
        key = next((key for key in CHATS if key in row), None)
        refuse_unread(
            row, read=("system", "tools") if key else (), fix="write it into the text, or into messages"
        )
        prompt, response = (
            render_response(tokenizer, entries_of(row, key), row) if key else ("", text_field(row, "text"))
        )
        label = _attributes(row.get("label"), labels, given="label" in row)
        return TextRow(
            prompt=prompt, responses=(response,), labels=(label,), rendered=key is not None, extras=row
        )

    lines = RecordFile(path, read)
    return LinePairs(lines, _join_labeled) if labels.paired else lines


def check_first_pairs(path: str | Path, *, most: int) -> None:
    """Read the first rows of a file as ``open_pairs`` will; messages are left to it, as they need a tokenizer.

    Raises:
        UserError: the file or a row cannot be read.
    """
    reader = _PairReader(path, None, quiet=True)
    RecordFile(path, lambda row: None if _has_messages(row) else reader(row), most=most)


def _has_messages(row: Mapping[str, object]) -> bool:
    return any(isinstance(row.get(key), list | dict) for key in ("prompt", "chosen", "rejected", *CHATS))


class _PairReader:
    """Reads a line's pair, or one text of a pair that takes two lines; which, the first line decides."""

    def __init__(self, path: str | Path, tokenizer: Tokenizer | None, *, quiet: bool = False) -> None:
        self.alternates: bool | None = None
        self._tokenizer = tokenizer
        self._recognised = Recognised(path, quiet=quiet)

    def __call__(self, row: Mapping[str, object]) -> TextRow:
        row = {_NEMO_NAMES.get(key, key): value for key, value in row.items()}
        alternates = _alternates(row)
        if self.alternates is None:
            self.alternates = alternates
        if alternates != self.alternates:
            raise UserError(
                f"the row has {keys_of(row)}, unlike the file's first one",
                fix=f"{_LAYOUTS}; not both in one file",
            )
        refuse_unread(
            row, read=("system", "tools", "instruction"), fix="write it into the texts, or as messages"
        )
        if alternates:
            refuse_unread(row, read=(), fix="write it into the text")
            return TextRow(prompt="", responses=(text_field(row, "text"),), extras=row)
        if _has_messages(row):
            return self._of_messages(row)
        # A row may repeat its prompt, or a part of it, as an instruction.
        repeats = "prompt" not in row or str(row.get("instruction")) in str(row["prompt"])
        refuse_unread(
            row,
            read=("instruction",) if repeats else (),
            fix="write it into the prompt, or write the row as messages",
        )
        if "prompt" not in row:
            self._recognised.say(
                "rows of {instruction, input, chosen, rejected}",
                "Alpaca's: instruction and input in its prompt",
            )
        prompt = text_field(row, "prompt") if "prompt" in row else f"{alpaca_prompt(row)} "
        chosen, rejected = text_field(row, "chosen"), text_field(row, "rejected")
        return TextRow(prompt=prompt, responses=(chosen, rejected), extras=row)

    def _of_messages(self, row: Mapping[str, object]) -> TextRow:
        self._recognised.say(
            "rows of {prompt, chosen, rejected} with messages", "conversations, laid out by the chat template"
        )
        conversations = split_pair(row)
        chosen, rejected = (render_response(self._tokenizer, entries, row) for entries in conversations)
        if chosen[0] != rejected[0]:
            # The template lays out the prompt by what follows it: the border is where the texts part.
            chosen, rejected = (("", prompt + response) for prompt, response in (chosen, rejected))
        contexts = [entries[:-1] for entries in conversations]
        return TextRow(
            prompt=chosen[0],
            responses=(chosen[1], rejected[1]),
            rendered=True,
            same_context=contexts[0] == contexts[1],
            extras=row,
        )


def _alternates(row: Mapping[str, object]) -> bool:
    if {"chosen", "rejected"} <= row.keys():
        written = [row[key] for key in ("chosen", "rejected")]
        if row.keys() & {"prompt", "instruction", *CHATS} or any(isinstance(text, list) for text in written):
            return False
        raise UserError(
            "key 'prompt' is missing beside 'chosen' and 'rejected'",
            fix="add the prompt; rows of Anthropic HH are converted by "
            "examples/nlp/data/anthropic_hh/download_and_process.py",
        )
    if "text" in row:
        return True
    raise UserError(f"the row is no pair and no text; it has {keys_of(row)}", fix=_LAYOUTS)


def _join_labeled(first: TextRow, second: TextRow) -> TextRow:
    preferences = first.labels[0][0], second.labels[0][0]
    if not preferences[0] == preferences[1]:  # NaN differs from itself
        raise UserError(
            f"the first numbers of the labels of a pair are {preferences[0]:g} and {preferences[1]:g}",
            fix="give both responses the same preference: below 0 if the first is better, else above 0",
        )
    if first.rendered != second.rendered:
        raise UserError("of a pair one is a text and the other has messages", fix="write both alike")
    return replace(
        first, prompt="", responses=(*first.texts, *second.texts), labels=(*first.labels, *second.labels)
    )


def _attributes(label: object, labels: Labels, *, given: bool) -> tuple[float, ...]:
    if not (isinstance(label, list) and label and all(map(is_finite_number, label))):
        raise UserError(
            f"key 'label' is {shorten(label)}" if given else "key 'label' is missing",
            fix=f"give it a list of {labels.num_attributes} numbers, {labels.missing:g} where there is no label",
        )
    if len(label) != labels.num_attributes:
        raise UserError(
            f"key 'label' has {len(label)} numbers, but model.regression.num_attributes={labels.num_attributes}",
            fix=f"set model.regression.num_attributes={len(label)}, if all rows have so many",
        )
    attributes = tuple(math.nan if number == labels.missing else float(number) for number in label)
    if all(map(math.isnan, attributes)):
        raise UserError(
            f"every number of key 'label' is {labels.missing:g}, so nothing is learned of the row",
            fix="remove the row, or set model.regression.loss_mask_val to what marks a missing number",
        )
    return attributes


def is_finite_number(value: object) -> bool:
    """True for a number that is finite as a float32 too, which batches hold; an int may be larger than any float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 3.4028234e38
