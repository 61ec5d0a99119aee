# SPDX-License-Identifier: Apache-2.0
"""Where an answer ends: at an end token, at a token that is an end string, or at the text of one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

SPARE_TOKENS = 4  # in the tail that is read, for tokens without a text


class Speller(Protocol):
    """What of a tokenizer end strings need."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``."""
        ...

    def token_id(self, token: str) -> int | None:
        """The id of one vocabulary entry, None if there is no such entry."""
        ...


@dataclass
class Stops:
    """The ends of answers.

    Args:
        ids: tokens that end an answer.
        texts: that end it wherever they fall in its tokens.
        speller: writes tokens out; None where there are no texts.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...] = ()
    speller: Speller | None = None
    _may_end: dict[int, bool] = field(
        default_factory=dict, init=False
    )  # by token: whether a text may end in it

    @classmethod
    def of(cls, end_ids: Sequence[int], end_strings: Sequence[str], speller: Speller | None) -> "Stops":
        """``end_ids`` and ``end_strings``; strings that are one token of the vocabulary are looked for by its id."""
        assert speller is not None or not end_strings, "end strings need a tokenizer"
        ids, texts = list(end_ids), []
        for text in end_strings:
            token = None if speller is None else speller.token_id(text)
            if token is None:
                texts.append(text)
            else:
                ids.append(token)
        return cls(tuple(dict.fromkeys(ids)), tuple(texts), speller)

    def __call__(self, before: Sequence[int], token: int) -> bool:
        """Whether ``token`` ends the answer whose tokens are ``before``."""
        if token in self.ids:
            return True
        if not self.texts or self.speller is None or not self._ends_with(token):
            return False
        longest = max(len(text.encode()) for text in self.texts)
        tail = self.speller.decode([*before[-longest - SPARE_TOKENS :], token])
        return any(text in tail for text in self.texts)

    def _ends_with(self, token: int) -> bool:
        """Whether a text may end within ``token``: writing out every tail would cost more than the model's layers."""
        if token not in self._may_end:
            assert self.speller is not None
            # Twice, as some tokenizers drop a space at the start.
            text = self.speller.decode([token, token])
            # What has no text of its own may be a part of a character.
            partial = not text.strip() or "\N{REPLACEMENT CHARACTER}" in text
            self._may_end[token] = partial or any(end[-1] in text for end in self.texts)
        return self._may_end[token]
