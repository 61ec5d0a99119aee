# SPDX-License-Identifier: Apache-2.0
"""Messages of pairs, labels and prompts as one text each, by the tokenizer's chat template."""

from collections.abc import Mapping, Sequence

from nemo_aligner.data.common_rows import CHATS, entries_of, refuse_unread
from nemo_aligner.data.conversations import read_messages, read_tools
from nemo_aligner.data.records import text_field
from nemo_aligner.data.rendering import render_prompt, render_turn
from nemo_aligner.data.row_files import keys_of
from nemo_aligner.data.tokenizer import Message, Tokenizer
from nemo_aligner.errors import UserError

Entry = Mapping[str, object]


def render_asked(tokenizer: Tokenizer | None, entries: Sequence[Entry], row: Entry) -> str:
    """A conversation whose next turn is the assistant's, as the model is asked it; ``row`` may offer tools.

    Raises:
        UserError: its last turn is the assistant's, the tokenizer has no template, or that refuses the messages.
    """
    messages = _checked(entries)
    if messages[-1]["role"] == "assistant":
        raise UserError(
            "the last message is the assistant's, so that nothing is asked",
            fix="end the messages with the turn that the model is to respond to",
        )
    return render_prompt(_templated(tokenizer), messages, read_tools(row))


def render_response(tokenizer: Tokenizer | None, entries: Sequence[Entry], row: Entry) -> tuple[str, str]:
    """(prompt, response): the response ends with the token that ends its turn; ``row`` may offer tools.

    Raises:
        UserError: its last turn is not the assistant's, the tokenizer has no template, or that refuses the messages.
    """
    messages = _checked(entries)
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise UserError(
            f"the last message has the role {messages[-1]['role']!r}, and a response is the assistant's",
            fix="end the messages with a prompt and the assistant's response",
        )
    prompt, response = render_turn(_templated(tokenizer), messages, read_tools(row))
    # White space after the end of a turn belongs to the next one, and a reward is read at the text's last token.
    return prompt, response.rstrip()


def split_pair(row: Entry) -> tuple[list[Entry], list[Entry]]:
    """The conversations that end with the chosen and with the rejected response.

    The prompt is that of the row (a text, or messages), or what both conversations begin with. A prompt that the
    conversations repeat stands once.

    Raises:
        UserError: they have no prompt in common, or one of them has no response after it.
    """
    chosen, rejected = (_responses(row, key) for key in ("chosen", "rejected"))
    prompt = _prompt(row, chosen)
    repeats = prompt and chosen[: len(prompt)] == rejected[: len(prompt)] == prompt
    if repeats:
        return chosen, rejected
    if prompt:
        return [*prompt, *chosen], [*prompt, *rejected]
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    if common == 0:
        raise UserError(
            "'chosen' and 'rejected' begin differently, and there is no 'prompt'",
            fix="add the prompt, as a text or as messages",
        )
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if len(messages) == common and chosen != rejected:
            raise UserError(
                f"{name!r} ends where the other one goes on", fix="let both be responses to one prompt"
            )
        if chosen != rejected and messages[common].get("role") != "assistant":
            raise UserError(
                f"after what 'chosen' and 'rejected' have in common, {name!r} goes on with the role "
                f"{messages[common].get('role')!r}",
                fix="let both be the assistant's responses to one prompt",
            )
    return chosen, rejected


def conversation_of(row: Entry, key: str) -> list[Entry]:
    """The conversation that ends with the response under ``key``, a text or messages, or the row's only conversation.

    Raises:
        UserError: there is no response, or it begins with a turn that is not the assistant's.
    """
    if key not in row:
        chat = next((name for name in CHATS if name in row), None)
        if chat is None:
            raise UserError(
                f"key {key!r} is missing; the row has {keys_of(row)}", fix=f"add {key!r} to the row"
            )
        return entries_of(row, chat)
    response = _responses(row, key)
    if response[0].get("role") != "assistant":
        raise UserError(
            f"key {key!r} begins with the role {response[0].get('role')!r}",
            fix="let it be the assistant's, and give the turns before it as the prompt",
        )
    return [*_prompt(row, response), *response]


def _responses(row: Entry, key: str) -> list[Entry]:
    if isinstance(row.get(key), str):
        return [{"role": "assistant", "content": text_field(row, key)}]
    text = {key: row.get(key)}
    return entries_of(text, key)


def _prompt(row: Entry, chosen: list[Entry]) -> list[Entry]:
    """The messages before the responses; empty where the row leaves them to the responses."""
    for key in ("prompt", *CHATS):
        if isinstance(row.get(key), list):
            return entries_of(row, key)
    if row.get("prompt") is None:
        return []
    text = text_field(row, "prompt")
    if chosen[0].get("role") == "assistant":
        return entries_of({"system": row.get("system"), "p": [{"role": "user", "content": text}]}, "p")
    if any(message.get("role") == "user" and message.get("content") == text for message in chosen):
        return []
    raise UserError(
        "key 'prompt' is not among the messages of 'chosen'",
        fix="let 'chosen' and 'rejected' begin with the prompt, or with the response",
    )


def _checked(entries: Sequence[Entry]) -> list[Message]:
    for entry in entries:
        flags = {name: entry[name] for name in ("weight", "train") if name in entry}
        refuse_unread(flags, read=(), fix="give the row without it")
    return read_messages({"messages": list(entries)}, "messages")


def _templated(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None or tokenizer.chat_template is None:
        raise UserError(
            "the row has messages, and the tokenizer has no chat template",
            fix="write texts, or give a model whose tokenizer has a chat template",
        )
    return tokenizer
