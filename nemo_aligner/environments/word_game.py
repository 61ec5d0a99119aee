# SPDX-License-Identifier: Apache-2.0
"""A game of several turns.

trainer.ppo.rewards.NAME.environment=nemo_aligner.environments.word_game.Guess
"""

from collections.abc import Mapping, Sequence
from typing import Any


class Guess:
    """Find a word of a list: each reply says whether it stands before or after the guess in the alphabet.

    A row has "words" and, of these, the "word" to be found. The reward is 1 when it is found, 0 until then.

    Args:
        replies: to a guess that is too late in the alphabet, one that is too early, and what is no word of the list.

    >>> game = Guess()
    >>> game.reset({"words": ["ant", "bee", "cat"], "word": "ant"}, seed=0)
    >>> game.step("bee"), game.step(" Dog"), game.step("ant")
    (('before', 0.0), ('unknown', 0.0), (None, 1.0))
    """

    def __init__(self, replies: Sequence[str] = ("before", "after", "unknown")) -> None:
        self._before, self._after, self._unknown = replies

    def reset(self, row: Mapping[str, Any], seed: int) -> None:
        """Begin an episode: with the word of the row, whatever the seed."""
        del seed
        self._words, self._word = row["words"], row["word"]

    def step(self, turn: str) -> tuple[str | None, float]:
        """Return the reply to a guess, and its reward; the reply is None when the word is found."""
        guess = turn.strip().lower()
        if guess == self._word:
            return None, 1.0
        if guess not in self._words:
            return self._unknown, 0.0
        return (self._before if self._word < guess else self._after), 0.0
