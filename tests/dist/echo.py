# SPDX-License-Identifier: Apache-2.0
"""The other side of a conversation, for tests."""

import random
from collections.abc import Mapping, Sequence

from nemo_aligner.rollout_batch import Prompt


class Echo:
    """Replies to each turn by its length and its last token, some polls later, and ends after ``turns`` of them."""

    def __init__(self, *, turns: int = 3, seed: int = 0) -> None:
        self.turns, self.draw = turns, random.Random(seed)
        self.heard: dict[tuple[int, int], list[list[int]]] = {}
        self.waiting: dict[tuple[int, int], int] = {}  # polls
        self.cuts: list[tuple[int, int]] = []

    @property
    def places(self) -> int | None:
        return None

    def cut(self, prompt: Prompt) -> None:
        self.cuts.append((prompt.number, prompt.sample))
        assert (prompt.number, prompt.sample) not in self.waiting, "what waits is not cut"

    def ended(self, prompt: Prompt, turn: Sequence[int]) -> None:
        key = (prompt.number, prompt.sample)
        assert key not in self.waiting, "a turn at a time"
        self.heard.setdefault(key, []).append(list(turn))
        self.waiting[key] = self.draw.randrange(4)

    def replies(self, *, wait: bool) -> Mapping[tuple[int, int], Sequence[int] | None]:
        found: dict[tuple[int, int], Sequence[int] | None] = {}
        for key in list(self.waiting):
            self.waiting[key] -= 1
            if self.waiting[key] < 0 or (wait and self.draw.random() < 0.5):
                del self.waiting[key]
                found[key] = self.reply(self.heard[key])
        return found

    def reply(self, heard: Sequence[Sequence[int]]) -> list[int] | None:
        return None if len(heard) == self.turns else [50 + len(heard[-1]) % 40, heard[-1][-1]]
