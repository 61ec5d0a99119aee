# SPDX-License-Identifier: Apache-2.0
"""Rows of SQuAD, the Stanford Question Answering Dataset, as prompt and response."""

from collections.abc import Mapping

from nemo_aligner.data.records import text_field
from nemo_aligner.data.row_files import shorten
from nemo_aligner.errors import UserError


def is_squad(row: Mapping[str, object]) -> bool:
    """True if a row has SQuAD's fields."""
    return {"context", "question", "answers"} <= row.keys()


def squad_prompt(row: Mapping[str, object]) -> str:
    """The context and the question of a row.

    >>> squad_prompt({"context": "Ann has a cat.", "question": "Who has it?"})
    'Context: Ann has a cat. Question: Who has it? Answer:'
    """
    return f"Context: {text_field(row, 'context').strip()} Question: {text_field(row, 'question').strip()} Answer:"


def squad_to_prompt_response(row: Mapping[str, object]) -> dict[str, str]:
    """Convert ``{context, question, answers}`` to {input, output}, the first text of the last.

    Raises:
        UserError: a field is missing or of another type, or there is no such text, as in a third of SQuAD 2.0.
    """
    given = row["answers"]
    texts = given.get("text") if isinstance(given, Mapping) else None
    if not (isinstance(texts, list) and texts and isinstance(texts[0], str)):
        raise UserError(
            f"key 'answers' has the value {shorten(given)}, without a text",
            fix='write "answers": {"text": ["..."]}, and leave questions without an answer out',
        )
    return {"input": squad_prompt(row), "output": texts[0]}
