# SPDX-License-Identifier: Apache-2.0
"""Replies between two turns of a model's, in tokens, as its chat template writes them.

Nothing that the model has seen or written is tokenized again.
"""

from collections.abc import Sequence

from nemo_aligner.data.rendering import render_prompt
from nemo_aligner.data.tokenizer import Message, Tokenizer, encode_after

# A turn that stands for the model's own, so that the text behind it is found.
_TURN = "Fine, 7351."
_ASKED: Message = {"role": "user", "content": "How are you?"}


def reply_tokens(tokenizer: Tokenizer, replies: Sequence[Message], *, turn: Sequence[int]) -> list[int]:
    """The tokens that follow a turn of the model's, up to where its next one begins.

    Of a template that ends turns, what the turn has of that end already is left out. Without a chat template they are
    those of the texts alone.

    Args:
        tokenizer: the model's.
        replies: messages of others, such as {"role": "tool", "content": "4"}.
        turn: the tokens of the model's turn, its end token among them.

    Raises:
        UserError: the chat template refuses these messages, or drops something that they say.
    """
    if tokenizer.chat_template is None:
        return encode_after(tokenizer, "".join(str(message["content"]) for message in replies))
    text = render_prompt(tokenizer, [_ASKED, {"role": "assistant", "content": _TURN}, *replies])
    _, _, behind = text.rpartition(_TURN)
    ids = encode_after(tokenizer, behind)
    if ids[:1] == list(turn[-1:]):
        return ids[1:]
    written = tokenizer.decode(turn)
    ends = range(min(len(behind), len(written)), 0, -1)
    known = next((n for n in ends if written.endswith(behind[:n])), 0)
    return encode_after(tokenizer, behind[known:])
