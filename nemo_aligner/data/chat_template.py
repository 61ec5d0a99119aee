# SPDX-License-Identifier: Apache-2.0
"""Chat templates as text: rendering one without a tokenizer's help, and fixing the date that one reads."""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time
from typing import Any

from nemo_aligner.errors import UserError

Message = dict[str, Any]  # {"role": ..., "content": ..., ...}, as chat templates read it
Tools = list[dict[str, Any]] | None  # JSON schemas of functions that may be called

_CLOCK = re.compile(r"strftime_now\s*\(\s*(?:\"([^\"\\]*)\"|'([^'\\]*)')\s*\)")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def reads_clock(template: str) -> bool:
    """True if what the template writes depends on the day."""
    return re.search(r"strftime_now\s*\(", template) is not None


def marks_generations(template: str) -> bool:
    """True if the template itself says, by ``{% generation %}``, what the assistant generates."""
    return _GENERATION.search(template) is not None


def pinned(template: str, day: date) -> str:
    """The template as it is on ``day``, whatever the day.

    Raises:
        UserError: the format of the date that it reads does not stand in the template as plain text.

    >>> pinned("{{ strftime_now('%d %b %Y') }}", date(2026, 1, 2))
    "{{ '02 Jan 2026' }}"
    """
    midnight = datetime.combine(day, time())
    found = _CLOCK.sub(lambda match: repr(midnight.strftime(match[1] or match[2] or "")), template)
    if reads_clock(found):
        raise UserError(
            "the tokenizer's chat template reads the clock in a way that cannot be pinned to the run's day: "
            "strftime_now is called with something else than a quoted format",
            fix="write the format into the call in the tokenizer's chat_template.jinja, e.g. "
            "strftime_now('%d %b %Y'), or set model.data.chat_template=prompt_tokens",
        )
    return found


def render(template: str | None, write: Callable[[], str], messages: Sequence[Mapping[str, Any]]) -> str:
    """The rendering of the messages that ``write`` makes with the tokenizer's chat template.

    Raises:
        UserError: there is none, it refuses the messages or fails at them, or they hold what is no text.
    """
    if template is None:
        raise UserError(
            "the tokenizer has no chat template",
            fix="put a chat_template.jinja beside its files and import the model again, fine-tune it on "
            "conversations, which stores one with it, or give text instead of messages",
        )
    try:
        text = write()
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"a message holds half of a surrogate pair, \\u{ord(error.object[error.start]):04x}, which is no text",
            fix="write the whole character, or remove it",
        ) from error
    except Exception as error:  # a template is a program of its own, and may fail in any way
        roles = [message.get("role") for message in messages]
        raise UserError(
            f"the tokenizer's chat template refuses a conversation with the roles {roles}: {error}",
            fix="bring the turns into the order and form that the template wants, or use another template "
            "(training: model.data.chat_template=prompt_tokens)",
        ) from error
    return text
