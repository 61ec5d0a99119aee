# SPDX-License-Identifier: Apache-2.0
"""Databricks Dolly rows as prompt and response: one rule, for the preparation script and for raw rows."""

import hashlib
import json
from collections.abc import Mapping

from nemo_aligner.data.records import text_field


def is_dolly(row: Mapping[str, object]) -> bool:
    """True if a row has Dolly's fields and not those that it would be converted to."""
    return {"instruction", "response"} <= row.keys() and not {"input", "output"} & row.keys()


def dolly_to_prompt_response(row: Mapping[str, object]) -> dict[str, str]:
    r"""Convert {instruction, context, response, category} to {input, output, category}.

    Context and instruction are joined by a blank line. A hash of the row chooses which comes first: half of
    all rows have either order, and a row has the same one wherever it is read.

    Raises:
        UserError: a field is not a string, or instruction or response is missing.

    >>> dolly_to_prompt_response({"instruction": "Name a colour.", "response": "Red."})
    {'input': 'Name a colour.', 'output': 'Red.', 'category': ''}
    """
    row = {"context": "", "category": "", **row}
    instruction, context, response, category = (
        text_field(row, key) for key in ("instruction", "context", "response", "category")
    )
    parts = [instruction.strip(), context.strip()]
    digest = hashlib.sha256(json.dumps([instruction, context, response]).encode()).digest()
    if digest[0] & 1:
        parts.reverse()
    return {"input": "\n\n".join(part for part in parts if part), "output": response, "category": category}
