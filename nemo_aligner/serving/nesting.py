# SPDX-License-Identifier: Apache-2.0
"""How deep a JSON text is nested, found without reading it: a reader that recurses has a stack that ends."""

import re

import numpy as np

__all__ = ["MAX_NESTING", "nesting"]

MAX_NESTING = 64
# A string that does not end lasts to the end: it is no JSON, and nothing in it is read.
_STRING = re.compile(rb'"(?:[^"\\]|\\[\s\S])*+(?:"|\\?\Z)')
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def nesting(text: bytes | bytearray) -> int:
    """The most brackets that are open at once, outside of strings.

    >>> nesting(b'{"a": [[1, 2], "[[[\\\\"[["]}')
    3
    """
    brackets = _STRING.sub(b"", text).translate(None, _NOT_BRACKETS)
    if not brackets:
        return 0
    opens = np.isin(np.frombuffer(brackets, dtype=np.uint8), list(b"[{"))
    return max(0, int(np.cumsum(np.where(opens, 1, -1), dtype=np.int64).max()))
