# SPDX-License-Identifier: Apache-2.0
r"""Files of one JSON object a line that a run adds to, and takes back where it does steps again.

Lines end at "\n" and nowhere else: a text in them may hold any other line separator.
"""

import itertools
import json
import logging
from collections.abc import Mapping
from io import RawIOBase
from pathlib import Path

logger = logging.getLogger(__name__)

# Ends of lines to str.splitlines and to other tools, which json.dumps leaves as they are.
_SEPARATORS = str.maketrans({separator: f"\\u{ord(separator):04x}" for separator in "\u0085\u2028\u2029"})


def record(values: Mapping[str, object]) -> str:
    r"""``values`` as one line, its end included; text stays readable.

    >>> record({"step": 1, "text": "naïve\u2028"})
    '{"step": 1, "text": "naïve\\u2028"}\n'
    """
    return json.dumps(values, ensure_ascii=False).translate(_SEPARATORS) + "\n"


def append(file: RawIOBase, text: str) -> None:
    """Add lines to a file without a buffer; half a character, which UTF-8 cannot hold, as the escape that JSON has."""
    content = text.encode(errors="backslashreplace")
    while content:
        # A disk that is nearly full takes a part.
        content = content[file.write(content) or 0 :]


def rewind(path: Path, step: int) -> None:
    """Leave the records of ``path`` up to ``step``; a file that would be left empty is moved aside.

    A damaged line costs that line: it goes to ``<name>.damaged`` beside the file, and the log says so. A last line
    without an end is one that a killed process has begun, and goes.
    """
    if not path.exists():
        return
    fresh, kept = path.with_suffix(".tmp"), 0
    damaged: list[tuple[int, bytes]] = []
    with path.open("rb") as old, fresh.open("wb") as new:
        for number, line in enumerate(old, start=1):
            if not line.endswith(b"\n"):
                continue
            at = _step_of(line)
            if at is None:
                damaged.append((number, line))
            elif at <= step:
                new.write(line)
                kept += 1
    if damaged:
        aside = path.with_name(path.name + ".damaged")
        with aside.open("ab") as stream:
            stream.writelines(line for _, line in damaged)
        numbers = ", ".join(str(number) for number, _ in damaged[:10]) + (", ..." if damaged[10:] else "")
        logger.warning(
            "%s: %d line(s) are no records (line %s) and are left out; they are kept in %s",
            *(path, len(damaged), numbers, aside.name),
        )
    if kept:
        fresh.replace(path)
        return
    fresh.unlink()
    number = next(n for n in itertools.count(1) if not path.with_suffix(f".{n}.jsonl").exists())
    path.rename(path.with_suffix(f".{number}.jsonl"))


def _step_of(line: bytes) -> int | None:
    """Of the step that a line is about; None: it is no record."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) and not isinstance(step, bool) else None
