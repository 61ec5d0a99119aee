# SPDX-License-Identifier: Apache-2.0
"""Damage by a seeded draw: to bytes, to the values of a JSON document, and to how such a document is written."""

import json
import random
import struct
from typing import Any

__all__ = ["bend", "raw_value", "spell", "spoil_file", "twist"]

# What json.dumps does not write. Each stands for itself in the text of a document.
RAW = (
    "null", "true", "false", "0", "-1", "1.5", "1e309", "-1e309", "NaN", "-Infinity", "1e-320", "9" * 400,
    "9" * 5000, "9223372036854775808", '""', '" "', '"\\u0000"', '"\\ud83d"', '"\\udc00x"', '"\\u2028\\u0085"',
    '"a\\tb"', '"1"', '"true"', '"' + "x" * 5000 + '"', '"é日本🙂"', '"../../etc/passwd"', '"{}"', '"{{ 1/0 }}"',
    "[]", "{}", "[null]", '[""]', "[1, 2]", "[[1]]", '{"a": 1}', '{"a": 1, "a": 2}', "[" * 60 + "]" * 60,
    "[" * 1000 + "]" * 1000, '{"a":' * 300 + "1" + "}" * 300, "[" * 5000, '"unclosed', "{'a': 1}", "nul", "",
)  # fmt: skip
_MARK = "@@raw"


def raw_value(draw: random.Random) -> str:
    """The text of a JSON value, or of what is none."""
    return draw.choice(RAW)


def bend(draw: random.Random, data: bytes) -> bytes:
    """The bytes with some of them flipped, cut, doubled, swapped or written over."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(len(out) + 1)
        match draw.randrange(9):
            case 0 if at < len(out):
                out[at] ^= 1 << draw.randrange(8)
            case 1:
                del out[at:]
            case 2:
                del out[at : at + draw.choice((1, 8, 100))]
            case 3:
                out[at:at] = out[at : at + draw.choice((1, 8, 200))]
            case 4:
                out[at : at + 8] = struct.pack("<q", draw.choice((0, -1, 1, 2**31, 2**62, -(2**63), 255)))
            case 5:
                out[at : at + 4] = draw.choice(
                    (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\n\n\n\n")
                )
            case 6:
                out[:0] = draw.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"[", b"\x1f\x8b", b"PAR1"))
            case 7:
                out[at:at] = draw.randbytes(draw.choice((1, 16, 300)))
            case _:
                other = draw.randrange(len(out) + 1)
                out[at : at + 16], out[other : other + 16] = out[other : other + 16], out[at : at + 16]
    return bytes(out)


def twist(draw: random.Random, value: Any) -> Any:
    """A copy of a JSON value of which one node is replaced, doubled, dropped, renamed or moved."""
    value = json.loads(json.dumps(value))
    places = [(None, None), *_places(value)]
    parent, key = draw.choice(places[1:] or places)
    if parent is None:
        return {_MARK: raw_value(draw)}
    match draw.randrange(8):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, dict):
            parent[draw.choice(("", "x", "\x00", "a.b", "null", "1", "${x}"))] = parent.pop(key)
        case 2 if isinstance(parent, list):
            parent.insert(key, parent[key])
        case 3:
            other, name = draw.choice(places[1:])
            if (
                isinstance(parent[key], dict | list) == isinstance(other[name], dict | list)
                or draw.random() < 0.3
            ):
                parent[key] = json.loads(json.dumps(other[name]))
        case 4 if isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
            parent[key] = draw.choice((0, -1, 1, 2, 3, 7, 0.5, 1e30, 2**40, -(2**70), str(parent[key])))
        case 5 if isinstance(parent[key], str):
            parent[key] = draw.choice(
                (parent[key] * 50, parent[key][:-1], parent[key].upper(), [parent[key]])
            )
        case _:
            parent[key] = {_MARK: raw_value(draw)}
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every node."""
    keys = range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else ()
    return [place for key in keys for place in ((value, key), *_places(value[key]))]


def spell(draw: random.Random, value: Any, *, indent: int | None = None) -> bytes:
    """The document as bytes; what ``twist`` put in stands there raw, and now and then a key twice."""
    text = json.dumps(value, indent=indent, ensure_ascii=draw.random() < 0.5)
    for raw in sorted(_raw_texts(value), key=len, reverse=True):
        quoted = json.dumps({_MARK: raw}, indent=indent)
        for form in {json.dumps({_MARK: raw}), json.dumps({_MARK: raw}, ensure_ascii=False), quoted}:
            text = text.replace(form, raw)
    if draw.random() < 0.05 and text.startswith("{") and isinstance(value, dict) and value:
        name = draw.choice(list(value))
        text = "{" + f"{json.dumps(name)}: {raw_value(draw)}, " + text[1:]
    return text.encode("utf-8", "surrogatepass")


def _raw_texts(value: Any) -> set[str]:
    if isinstance(value, dict):
        if _MARK in value:
            return {value[_MARK]}
        return set().union(*map(_raw_texts, value.values())) if value else set()
    return set().union(*map(_raw_texts, value)) if isinstance(value, list) and value else set()


def spoil_file(draw: random.Random, data: bytes) -> bytes:
    """A JSON file with a value changed, or with its bytes bent."""
    if draw.random() < 0.6:
        return spell(draw, twist(draw, json.loads(data)), indent=draw.choice((None, 2)))
    return bend(draw, data)
