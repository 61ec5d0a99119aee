# SPDX-License-Identifier: Apache-2.0
"""Conversations of a model that writes: a person's function replies to each of its turns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from nemo_aligner.data.replies import reply_tokens
from nemo_aligner.data.tokenizer import Message, Tokenizer
from nemo_aligner.rollout_batch import Prompt

Reply = Callable[[int, int, str], str | Sequence[Message] | None]
"""``reply(number, sample, turn)``: a user's text, messages, or None where the conversation ends."""


@dataclass
class Replies:
    """The other side of conversations, which replies at once; see ``alignable_interface.Turns``."""

    reply: Reply
    tokenizer: Tokenizer
    end_ids: Sequence[int]  # tokens that end a turn
    _come: dict[tuple[int, int], Sequence[int] | None] = field(
        default_factory=dict[tuple[int, int], Sequence[int] | None], init=False
    )

    def ended(self, prompt: Prompt, turn: Sequence[int]) -> None:
        """See Turns."""
        text = self.tokenizer.decode(turn[:-1] if turn[-1] in self.end_ids else turn)
        said = self.reply(prompt.number, prompt.sample, text)
        messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
        tokens = None if messages is None else reply_tokens(self.tokenizer, messages, turn=turn)
        self._come[prompt.number, prompt.sample] = tokens

    def replies(self, *, wait: bool) -> Mapping[tuple[int, int], Sequence[int] | None]:
        """See Turns."""
        del wait  # all have come
        come, self._come = self._come, {}
        return come
