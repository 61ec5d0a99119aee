# SPDX-License-Identifier: Apache-2.0
"""A command line's words as Hydra is to read them: text is taken as it was typed, everything else by Hydra's grammar.

Whether a setting is text follows from its type. Knows dataclasses, and no script's settings.
"""

import builtins
import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

from nemo_aligner.errors import UserError
from nemo_aligner.paths import PathText

_WORD = re.compile(r"(?P<sign>\+{0,2})(?P<key>[A-Za-z_][\w.]*)=(?P<value>.*)", re.DOTALL)

# A folder of YAMLs beside the script's, each with settings of a paper: recipe=NAME.
RECIPE = "recipe"
_MOST_BRACKETS = 50  # Python's stack holds Hydra's parser at that depth
_MANY_DIGITS = re.compile(r"\d[\d_]{4000}")  # more than Python makes a number of


def as_hydra_reads(words: Sequence[str], kind: type[object]) -> list[str]:
    """The words, with the value of each text setting in Hydra's quotes.

    A value that the user has put into quotes, and null where a setting may be null, stay as they are. Each setting may
    be one that the YAML lacks: such keys are refused by ours, as Hydra's own message proposes to add them.

    Args:
        words: of the command line, without the script.
        kind: the script's settings.

    Raises:
        UserError: a word is of such a kind that Hydra's parser would die of it.

    >>> @dataclasses.dataclass
    ... class Settings:
    ...     name: str
    ...     sizes: tuple[int, ...]
    >>> as_hydra_reads(["name=a=b, it's (1)", "sizes=[1,2]", "--cfg", "job"], Settings)
    ["++name='a=b, it\\\\'s (1)'", '++sizes=[1,2]', '--cfg', 'job']
    """
    return [_read(word, kind) for word in words]


def quoted(text: str) -> str:
    """A text in Hydra's quotes."""
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def is_quoted(value: str) -> bool:
    """True if the user has put all of a value into quotes, which are then not part of it."""
    return len(value) > 1 and value[0] == value[-1] and value[0] in "'\""


def _read(word: str, kind: type[object]) -> str:
    found = _WORD.fullmatch(word)
    if found is None:
        _check(word)
        return word
    value = found["value"]
    if found["key"] == RECIPE and not found["sign"]:
        return f"+{word}"
    if _is_text(value, _type_of(kind, found["key"])):
        value = quoted(value)
    else:
        _check(word)
    return f"{found['sign'] or '++'}{found['key']}={value}"


def _check(word: str) -> None:
    if sum(map(word.count, "[{(")) > _MOST_BRACKETS or _MANY_DIGITS.search(word):
        raise UserError(
            f"{word[:60]} ... cannot be read: it has too many brackets, or digits in a number",
            fix="write it shorter, or into a file that the setting names",
        )


def _type_of(kind: Any, key: str) -> Any:  # noqa: ANN401 - a type hint
    """The type hint of a dotted key in nested dataclasses; None where there is no such field."""
    name, _, rest = key.partition(".")
    if not dataclasses.is_dataclass(kind):
        return None
    hint = typing.get_type_hints(kind, include_extras=True).get(name)
    return _type_of(hint, rest) if rest else hint


def _is_text(value: str, hint: Any) -> bool:  # noqa: ANN401 - a type hint
    """True if a typed value is text as it stands, and not an expression of Hydra's grammar."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = set(typing.get_args(hint) if union else (hint,))
    if value == "null" and options & {type(None), PathText}:
        return False
    options = {str if option == PathText else option for option in options - {type(None)}}
    holds_several = {option for option in options if typing.get_origin(option) in (tuple, list, dict)}
    if value[:1] in ("[", "{") and holds_several:
        return False
    match options - holds_several:
        case kinds if kinds == {str}:
            return not is_quoted(value)
        case kinds if kinds and kinds <= {builtins.int, builtins.float}:
            # A decimal comma: Hydra would take it for a sweep. That it is no number is reported where numbers are read.
            return "," in value
    return False
