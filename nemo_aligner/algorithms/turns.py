# SPDX-License-Identifier: Apache-2.0
"""Conversations of a model that writes: a person's function replies to each of its turns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from nemo_aligner.algorithms.rollout import text_of_turn
from nemo_aligner.data.replies import reply_tokens
from nemo_aligner.data.tokenizer import Message, Tokenizer
from nemo_aligner.errors import UserError
from nemo_aligner.rollout_batch import Prompt

Reply = Callable[[int, int, str], str | Sequence[Message] | None]
"""``reply(number, sample, turn)``: a user's text, messages, or None where the conversation ends."""


@dataclass
class Replies:
    """The other side of conversations, which replies at once; see ``alignable_interface.Turns``."""

    reply: Reply
    tokenizer: Tokenizer
    end_ids: Sequence[int]  # tokens that end a turn
    end_strings: Sequence[str]  # texts that do
    _come: dict[tuple[int, int], Sequence[int] | None] = field(
        default_factory=dict[tuple[int, int], Sequence[int] | None], init=False
    )

    @property
    def places(self) -> None:
        """See Turns."""

    def cut(self, prompt: Prompt) -> None:
        """See Turns."""

    def ended(self, prompt: Prompt, turn: Sequence[int]) -> None:
        """See Turns."""
        text = text_of_turn(turn, self.end_ids, self.end_strings, decode=self.tokenizer.decode)
        said = self.reply(prompt.number, prompt.sample, text)
        tokens = None if said is None else tokens_of_reply(self.tokenizer, said, turn=turn)
        self._come[prompt.number, prompt.sample] = tokens

    def replies(self, *, wait: bool) -> Mapping[tuple[int, int], Sequence[int] | None]:
        """See Turns."""
        del wait  # all have come
        come, self._come = self._come, {}
        return come


def tokens_of_reply(tokenizer: Tokenizer, said: str | Sequence[Message], *, turn: Sequence[int]) -> list[int]:
    """The tokens that follow a turn of the model's: of messages, or of a user's text; see :func:`reply_tokens`.

    Raises:
        UserError: there are none, so that two turns would be one; or as of :func:`reply_tokens`.
    """
    messages: Sequence[Message] = [{"role": "user", "content": said}] if isinstance(said, str) else said
    tokens = reply_tokens(tokenizer, messages, turn=turn)
    if not tokens:
        raise UserError(
            f"the reply {said!r} has no tokens",
            fix="reply with a text, or with None where the conversation ends",
        )
    return tokens
