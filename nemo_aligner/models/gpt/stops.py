# SPDX-License-Identifier: Apache-2.0
"""The end of a response: at an end token, at a token that is an end string, or at the text of one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

EXTRA_TOKENS = 4  # in the tail that is read, for tokens without a text


class Detokenizer(Protocol):
    """The interface of a tokenizer for end strings."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``."""
        ...

    def token_id(self, token: str) -> int | None:
        """The id of one vocabulary entry, None if there is no such entry."""
        ...


@dataclass
class Stops:
    """The ends of responses.

    Args:
        ids: tokens that end a response.
        texts: that end it wherever they fall in its tokens.
        detokenizer: decodes tokens; None where there are no texts.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...] = ()
    detokenizer: Detokenizer | None = None
    # by token: whether a text may end in it
    _may_end: dict[int, bool] = field(default_factory=dict, init=False)

    @classmethod
    def of(
        cls, end_ids: Sequence[int], end_strings: Sequence[str], detokenizer: Detokenizer | None
    ) -> "Stops":
        """``end_ids`` and ``end_strings``; strings that are one token of the vocabulary are looked for by its id."""
        assert detokenizer is not None or not end_strings, "end strings need a tokenizer"
        ids, texts = list(end_ids), []
        for text in end_strings:
            token = None if detokenizer is None else detokenizer.token_id(text)
            if token is None:
                texts.append(text)
            else:
                ids.append(token)
        return cls(tuple(dict.fromkeys(ids)), tuple(texts), detokenizer)

    def __call__(self, before: Sequence[int], token: int) -> bool:
        """True if ``token`` ends the response whose tokens are ``before``."""
        if token in self.ids:
            return True
        if not self.texts or self.detokenizer is None or not self._ends_with(token):
            return False
        longest = max(len(text.encode()) for text in self.texts)
        tail = self.detokenizer.decode([*before[-longest - EXTRA_TOKENS :], token])
        return any(text in tail for text in self.texts)

    def _ends_with(self, token: int) -> bool:
        """True if a text may end within ``token``: writing out every tail would cost more than the model's layers."""
        if token not in self._may_end:
            assert self.detokenizer is not None
            # Twice, as some tokenizers drop a space at the start.
            text = self.detokenizer.decode([token, token])
            # What has no text of its own may be a part of a character.
            partial = not text.strip() or "\N{REPLACEMENT CHARACTER}" in text
            self._may_end[token] = partial or any(end[-1] in text for end in self.texts)
        return self._may_end[token]
