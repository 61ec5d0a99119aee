# SPDX-License-Identifier: Apache-2.0
"""Conversations through a chat template, and a refusal where the template drops what a message says.

A template reads what it knows and passes over the rest without a word. What it passed over is found by rendering
again without it: where the text is the same, nothing was rendered.
"""

from collections.abc import Sequence

from nemo_aligner.data.row_files import shorten
from nemo_aligner.data.tokenizer import Message, Tokenizer, Tools
from nemo_aligner.errors import UserError

_REASONING = ("reasoning_content", "reasoning", "thinking")  # names of one thing, which transformers equates
_OTHER_TEMPLATE = "give the tokenizer a chat template that renders it (chat_template.jinja beside its files)"


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools = None) -> str:
    """The text that asks a model to respond to ``messages``.

    Raises:
        UserError: there is no chat template, or it refuses the messages or drops something that they say.
    """
    text = tokenizer.render_chat(messages, add_generation_prompt=True, tools=tools)
    if tools and _same(tokenizer, messages, None, text):
        raise UserError(
            f"key 'tools': the tokenizer's chat template drops the row's {len(tools)} functions",
            fix=f"{_OTHER_TEMPLATE}, or remove 'tools'",
        )
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            keys = [("tool_calls",), ("function_call",)]
        elif index > last or message["role"] in ("system", "developer"):
            # A tool's response stands beside the call that names it.
            keys = [] if message["role"] in ("tool", "function", "ipython") else [("name",)]
            keys += [] if _shows(text, message.get("content", "")) else [("content",)]
        else:
            continue
        for names in keys:
            without = _without(messages, index, names)
            if without is not None and _same(tokenizer, without, tools, text):
                raise _dropped(index, names)
    return text


def render_turn(tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools = None) -> tuple[str, str]:
    """The text that the last message is asked with, and the rest of the rendering with that message.

    Raises:
        UserError: as ``render_prompt``; or the rendering does not go on from the prompt, or lacks something of the
            last message.
    """
    index, message = len(messages) - 1, messages[-1]
    prompt = render_prompt(tokenizer, messages[:-1], tools)
    through = tokenizer.render_chat(messages, tools=tools)
    content = message.get("content", "")
    for names in (_REASONING, ("tool_calls",), ("function_call",), ("name",)):
        without = _without(messages, index, names)
        if without is not None and _through(tokenizer, without, tools) == through:
            raise _dropped(index, names)
    response = _rest(prompt, through, asked=messages[-2].get("content", ""), content=content)
    if response is None:
        raise UserError(
            f"the tokenizer's chat template writes message {index + 1} in another way than it asks for it: a model "
            f"that is asked reads {prompt[-30:]!r} last, and the rendered turn does not stand after that",
            fix="use a template whose turns go on from its generation prompt, or set "
            "model.data.chat_template=prompt_tokens",
        )
    if not _shows(response, content):
        raise UserError(
            f"the tokenizer's chat template drops or changes text of message {index + 1}: {shorten(content)} is "
            f"written as {shorten(response)}",
            fix="write reasoning under 'reasoning_content' if the template renders that, or "
            "give the tokenizer a chat template that keeps the text",
        )
    return prompt, response


def _dropped(index: int, names: Sequence[str]) -> UserError:
    return UserError(
        f"key {names[0]!r} of message {index + 1}: the tokenizer's chat template drops it",
        fix=f"{_OTHER_TEMPLATE}, or remove {names[0]!r} from the message",
    )


def _without(messages: Sequence[Message], index: int, names: Sequence[str]) -> list[Message] | None:
    """The messages, one of them without these keys; None where it has none of them or they are empty."""
    if not any(messages[index].get(name) for name in names):
        return None
    kept = {key: value for key, value in messages[index].items() if key not in names}
    return [
        *messages[:index],
        kept | ({"content": ""} if "content" not in kept else {}),
        *messages[index + 1 :],
    ]


def _same(tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools, text: str) -> bool:
    try:
        return tokenizer.render_chat(messages, add_generation_prompt=True, tools=tools) == text
    except UserError:  # the template cannot do without it
        return False


def _through(tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools) -> str | None:
    try:
        return tokenizer.render_chat(messages, tools=tools)
    except UserError:  # the template cannot do without it
        return None


def _shows(text: str, content: str) -> bool:
    """True if ``text`` has all of ``content``, which templates may trim and space anew."""
    return content.strip() in text or "".join(content.split()) in "".join(text.split())


def _rest(prompt: str, through: str, *, asked: str, content: str) -> str | None:
    """The part of a rendering after the prompt; None if the prompt's end is not before the turn.

    A template may write earlier text anew once the response stands there. The message that was ``asked`` and all that
    follows it in the prompt must be left as they are.
    """
    if through.startswith(prompt):
        return through[len(prompt) :]
    start = prompt.rfind(asked.strip()) if asked.strip() else -1
    tail = prompt[start:] if start >= 0 else ""
    at = through.rfind(tail) if tail else -1
    while at >= 0:
        rest = through[at + len(tail) :]
        if _shows(rest, content):
            return rest
        at = through.rfind(tail, 0, at + len(tail) - 1)
    return None
