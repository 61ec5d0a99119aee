# SPDX-License-Identifier: Apache-2.0
"""Learned turns to samples: each after exactly the tokens that a model is sent when it is asked for that turn.

Where the prompt of a turn goes on from the tokens of the turn before, one sample holds both; where it does not, since
a template rewrites what stands before, the turn begins a sample of its own.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from nemo_aligner.data.row import Row, finish
from nemo_aligner.data.tokenizer import Tokenizer, encode_after
from nemo_aligner.errors import UserError

# characters; a longer special token could begin before a place that is taken for its start
_LONGEST_SPECIAL = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedTurn:
    """One turn in tokens."""

    prompt: list[int]  # what a model is sent
    response: list[int]  # what it is to write, the turn's end included
    loss_mask: list[bool]  # as long as the response: which of its tokens count in the loss
    closing: list[int] = field(default_factory=list)  # ends the response, also where it is cut
    eos: list[int] = field(default_factory=list)  # follows where the sample ends with this turn

    def cut(self, length: int) -> "LearnedTurn | None":
        """The turn with at most ``length`` tokens in all, its end kept; None where none of its text would be left."""
        ended = bool(self.closing) and self.response[-len(self.closing) :] == self.closing
        body = len(self.response) - (len(self.closing) if ended else 0)
        kept = min(length - len(self.prompt) - len(self.closing) - len(self.eos), body)
        if kept < 1 or not any(self.loss_mask[:kept]):
            return None
        return LearnedTurn(
            prompt=self.prompt,
            response=[*self.response[:kept], *self.closing],
            loss_mask=[*self.loss_mask[:kept], *[True] * len(self.closing)],
            eos=self.eos,
        )


class GrowingText:
    """Tokenises texts that begin alike, as the prompts of one conversation do, without doing the beginning again.

    Args:
        tokenizer: where ids come from.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._text, self._ids, self._anchors = "", list[int](), list[tuple[int, int]]()

    def __call__(self, text: str) -> list[int]:
        """The ids of ``text``, as the tokenizer's ``encode`` has them."""
        kept = next(
            (
                i
                for i in range(len(self._anchors) - 1, -1, -1)
                if len(self._text) >= self._anchors[i][0] + _LONGEST_SPECIAL
                and text.startswith(self._text[: self._anchors[i][0] + _LONGEST_SPECIAL])
            ),
            None,
        )
        start, token = (0, 0) if kept is None else self._anchors[kept]
        ids, anchors = self._tokenizer.encode_anchored(text[start:])
        self._ids = self._ids[:token] + ids
        self._anchors = (self._anchors[:kept] if kept else []) + [
            (start + at, token + index) for at, index in anchors
        ]
        self._text = text
        return self._ids


def continuation(
    tokenizer: Tokenizer,
    prompt: str,
    ids: list[int],
    response: str,
    *,
    encode: Callable[[str], list[int]] | None = None,
) -> list[int]:
    """The tokens of ``response`` after ``prompt``, whose tokens are ``ids``: those of the whole text.

    Where the whole text has a token that crosses the border, which a model that is sent ``ids`` cannot write, they are
    the tokens of ``response`` alone.
    """
    whole = (encode or tokenizer.encode)(prompt + response)
    return whole[len(ids) :] if whole[: len(ids)] == ids else encode_after(tokenizer, response)


def end_of_turn(tokenizer: Tokenizer, response: list[int]) -> int | None:
    """How many tokens there are up to the special token that ends a turn; None where none does."""
    specials = tokenizer.added_ids | {tokenizer.eos_id}
    stop = len(response)
    while stop and response[stop - 1] not in specials and not tokenizer.decode([response[stop - 1]]).strip():
        stop -= 1
    if not stop or response[stop - 1] not in specials:
        return None
    end = response[stop - 1]
    if response[:stop].count(end) > 1:
        raise UserError(
            f"the text of a turn holds {tokenizer.decode([end])!r}, which ends a turn: a model that learns it would "
            "stop there",
            fix="remove it from the text, or the row",
        )
    return stop


def lay_out(turns: Iterable[LearnedTurn], *, max_seq_length: int) -> list[Row]:
    """Samples of at most ``max_seq_length`` tokens; none where no turn has room for a token of its response.

    A turn that is too long is cut, keeping its end; one whose prompt leaves no room is left out. Either way the sample
    before or of it counts as truncated.
    """
    rows: list[_Sample] = []
    lost = False
    for turn in turns:
        fits = len(turn.prompt) + len(turn.response) + len(turn.eos) <= max_seq_length
        kept = turn if fits else turn.cut(max_seq_length)
        if kept is None:
            lost = True
            continue
        if not (rows and rows[-1].takes(kept)):
            rows.append(_Sample())
        rows[-1].add(kept, truncated=kept is not turn)
    if lost and rows:
        rows[-1].truncated = True
    return [row.sample(max_seq_length) for row in rows]


@dataclass(slots=True)
class _Sample:
    tokens: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    eos: list[int] = field(default_factory=list)
    truncated: bool = False

    def takes(self, turn: LearnedTurn) -> bool:
        return not self.truncated and turn.prompt[: len(self.tokens)] == self.tokens

    def add(self, turn: LearnedTurn, *, truncated: bool) -> None:
        between = turn.prompt[len(self.tokens) :]
        self.tokens = [*turn.prompt, *turn.response]
        self.loss_mask += [*[False] * len(between), *turn.loss_mask]
        self.eos, self.truncated = turn.eos, truncated

    def sample(self, max_seq_length: int) -> Row:
        return finish(
            [*self.tokens, *self.eos],
            [*self.loss_mask, *[True] * len(self.eos)],
            truncated=self.truncated,
            max_seq_length=max_seq_length,
        )
