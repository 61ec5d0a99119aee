# SPDX-License-Identifier: Apache-2.0
"""Conversations to samples: with NeMo's prompt tokens, or with the tokenizer's own chat template.

Either way a learned turn stands after exactly the tokens that the model is sent when it is asked for that turn.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict

from nemo_aligner.data.common_rows import Recognised, messages_row
from nemo_aligner.data.config import ChatPromptTokens, SFTSplitConfig
from nemo_aligner.data.conversations import Chat, Message, Turn, read_chat
from nemo_aligner.data.markers import marker_template
from nemo_aligner.data.rendering import render_prompt, render_turn
from nemo_aligner.data.row import Row, split_bos
from nemo_aligner.data.tokenizer import Tokenizer, encode_after
from nemo_aligner.data.turns import GrowingText, LearnedTurn, continuation, end_of_turn, lay_out
from nemo_aligner.errors import UserError

_SPEAKERS = {"User", "Assistant"}  # those that chat templates know
# Keys of a message that only some chat templates show.
_MEANINGFUL = ("reasoning_content", "reasoning", "thinking", "tool_calls", "function_call", "name")


def read_markable_chat(row: Mapping[str, object], recognised: Recognised) -> Chat:
    """A conversation of either layout, with nothing that prompt tokens cannot show.

    Raises:
        UserError: it is no conversation, or has more than turns of text.
    """
    chat = read_chat(messages_row(row, recognised))
    if chat.tools:
        raise _not_shown("key 'tools'")
    for number, turn in enumerate(chat.turns, 1):
        if turn.message is None:
            continue
        if turn.speaker not in _SPEAKERS:
            raise _not_shown(f"the role {turn.speaker!r} of turn {number}")
        if more := [key for key, value in turn.message.items() if value and key in _MEANINGFUL]:
            raise _not_shown(f"key {more[0]!r} of turn {number}")
    if chat.kind is None and any(turn.label for turn in chat.turns):
        recognised.say(
            "labels of turns, and no type", "conversations without labels; VALUE_TO_TEXT shows them"
        )
    return chat


class PromptTokensLayout:
    """Lays out turns between prompt tokens, e.g. ``<extra_id_1>Assistant\\nHello\\n<extra_id_1>``.

    The system text, names and labels before a text are not learned. The ``turn_start`` after a learned turn
    is: there the model learns to stop. Of a turn with a label in a TEXT_TO_VALUE row only the label is learned.
    Turns after the last learned one are left out, as no loss token follows.

    Args:
        tokenizer: where ids come from.
        tokens: the text that marks turns.
        cfg: length and special tokens.
        learn: ``all`` turns that are to be learned, or the ``last`` of them.

    Raises:
        UserError: the tokenizer cannot write one of the prompt tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, tokens: ChatPromptTokens, cfg: SFTSplitConfig, *, learn: str = "all"
    ) -> None:
        self._tokenizer = tokenizer
        self._recognised = Recognised(cfg.path)
        self._tokens = tokens.unescaped()
        self._cfg, self._learn = cfg, learn
        for name, text in asdict(self._tokens).items():
            _check_writable(tokenizer, name, text)
        self._stop = encode_after(tokenizer, self._tokens.turn_start)
        starts_with_bos = bool(split_bos([[]], tokenizer=tokenizer, add_bos=cfg.add_bos))
        self._bos = tokenizer.bos_token or "" if starts_with_bos else ""
        self.chat_template = marker_template(tokens, starts_with_bos=starts_with_bos)

    def read(self, row: Mapping[str, object]) -> Chat:
        """See :func:`read_markable_chat`."""
        return read_markable_chat(row, self._recognised)

    def __call__(self, chat: Chat) -> list[Row]:
        """The samples; none where nothing of it has room. UserError if nothing of it is left to learn."""
        return lay_out(self._turns(chat), max_seq_length=self._cfg.max_seq_length)

    def _turns(self, chat: Chat) -> Iterator[LearnedTurn]:
        tokens, chosen, encode = self._tokens, _chosen(chat, self._learn), GrowingText(self._tokenizer)
        text = self._bos + tokens.system(chat.system)
        for index, turn in enumerate(chat.turns[: chosen[-1] + 1]):
            name = tokens.speaker(turn.speaker)
            body = f"{turn.text}{tokens.end_of_turn}"
            before, after = self._label(turn, chat.kind)
            if index in chosen:
                # A label that follows the text is all that is learned of a turn; its text leads to it.
                context, learned = (body + tokens.label_start, after) if after else (before, body)
                turn = self._turn(text + name + context, learned + tokens.turn_start, encode)
                yield turn
                if len(turn.prompt) >= self._cfg.max_seq_length:
                    return  # every later prompt is longer
            text += name + before + body + (tokens.label_start + after if after else "")

    def _turn(self, prompt: str, response: str, encode: GrowingText) -> LearnedTurn:
        ids = encode(prompt)
        reply = continuation(self._tokenizer, prompt, ids, response, encode=encode)
        eos = self._tokenizer.eos_id
        return LearnedTurn(
            prompt=ids,
            response=reply,
            loss_mask=[True] * len(reply),
            closing=self._stop,
            eos=[eos] if self._cfg.add_eos and reply[-1:] != [eos] else [],
        )

    def _label(self, turn: Turn, kind: str | None) -> tuple[str, str]:
        """The label as it stands before a turn's text, its start included, and after it, its start left out."""
        if turn.label is None or kind is None:
            return "", ""
        label = f"{turn.label}{self._tokens.end_of_name}"
        return (self._tokens.label_start + label, "") if kind == "VALUE_TO_TEXT" else ("", label)


class TemplateLayout:
    """Lays out turns as the tokenizer's chat template does; the assistant's turns are learned.

    A turn's prompt is the template's rendering of what stands before it, with the generation prompt; what is learned
    is the rest of the rendering through the turn, up to the special token that ends it, or what the template marks as
    generated.

    Args:
        tokenizer: where the template and ids come from.
        cfg: length and special tokens.
        learn: ``all`` turns that are to be learned, or the ``last`` of them.

    Raises:
        UserError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Tokenizer, cfg: SFTSplitConfig, *, learn: str = "all") -> None:
        if tokenizer.chat_template is None:
            raise UserError(
                "model.data.chat_template=tokenizer, but the tokenizer has no chat template",
                fix="set model.data.chat_template=prompt_tokens, or give a tokenizer that has a template",
            )
        self._recognised = Recognised(cfg.path)
        self._tokenizer = tokenizer
        self._cfg, self._learn = cfg, learn
        # The template writes BOS where the model wants it; it is put first only where that is asked for.
        self._bos = split_bos([[]], tokenizer=tokenizer, add_bos=bool(cfg.add_bos))

    def read(self, row: Mapping[str, object]) -> Chat:
        """A conversation of either layout, its speakers being those that templates know."""
        chat = read_chat(messages_row(row, self._recognised))
        strange = sorted({turn.speaker for turn in chat.turns if turn.message is None} - _SPEAKERS)
        if strange or chat.mask != "User":
            raise UserError(
                f"speakers {strange} and mask {chat.mask!r} have no place in the tokenizer's chat template"
                if strange
                else f"mask {chat.mask!r} would train on the user's turns",
                fix="name the speakers User and Assistant with mask User, or set "
                "model.data.chat_template=prompt_tokens",
            )
        if chat.kind is not None:
            raise UserError(
                f"type {chat.kind!r} asks for labels, which the tokenizer's chat template cannot show",
                fix="set model.data.chat_template=prompt_tokens",
            )
        return chat

    def __call__(self, chat: Chat) -> list[Row]:
        """The samples; none where nothing of it has room. UserError if the template drops or refuses something."""
        return lay_out(self._turns(chat), max_seq_length=self._cfg.max_seq_length)

    def _turns(self, chat: Chat) -> Iterator[LearnedTurn]:
        messages = chat.messages
        opening = len(messages) - len(chat.turns)
        chosen, encode = _chosen(chat, self._learn), GrowingText(self._tokenizer)
        for index in chosen:
            through = messages[: opening + index + 1]
            prompt, response = render_turn(self._tokenizer, through, chat.tools)
            turn = self._turn(prompt, response, through, chat, encode)
            yield turn
            if len(turn.prompt) >= self._cfg.max_seq_length and index != chosen[-1]:
                last = render_prompt(self._tokenizer, messages[: opening + chosen[-1]], chat.tools)
                if last.startswith(prompt):
                    return  # every later prompt is longer

    def _turn(
        self, prompt: str, response: str, messages: list[Message], chat: Chat, encode: GrowingText
    ) -> LearnedTurn:
        tokenizer = self._tokenizer
        ids = encode(prompt)
        reply = continuation(tokenizer, prompt, ids, response, encode=encode)
        mask = [True] * len(reply)
        if marked := tokenizer.marked_chat(messages, tools=chat.tools):
            reply, mask = _as_marked(reply, *marked)
            closing, eos = reply[-1:] if reply[-1] in tokenizer.added_ids else [], []
        elif stop := end_of_turn(tokenizer, reply):
            reply, mask, closing, eos = reply[:stop], mask[:stop], reply[stop - 1 : stop], []
        else:
            closing, eos = [], [tokenizer.eos_id] if self._cfg.add_eos else []
        return LearnedTurn(
            prompt=ids if ids[: len(self._bos)] == self._bos else self._bos + ids,
            response=reply,
            loss_mask=mask,
            closing=closing,
            eos=eos,
        )


def _chosen(chat: Chat, learn: str) -> list[int]:
    learned = [index for index in range(len(chat.turns)) if chat.learned(index)]
    return learned if learn == "all" else learned[-1:]


def _as_marked(reply: list[int], whole: list[int], marks: list[bool]) -> tuple[list[int], list[bool]]:
    """A response, which ends ``whole``, up to the last token that its template marks as generated, and its marks."""
    agrees = whole[-len(reply) :] == reply
    own = marks[-len(reply) :] if agrees else [True] * len(reply)
    after = marks[::-1].index(True) if True in marks else len(reply)
    if after >= len(reply):
        raise UserError(
            "the tokenizer's chat template marks nothing of a turn as generated",
            fix="mend its {% generation %} block, or remove it from the template",
        )
    return reply[: len(reply) - after], own[: len(reply) - after]


def _not_shown(what: str) -> UserError:
    return UserError(
        f"{what} cannot be shown between prompt tokens",
        fix="use a tokenizer whose chat template shows it, with model.data.chat_template=tokenizer, or remove it",
    )


def _check_writable(tokenizer: Tokenizer, name: str, text: str) -> None:
    if text.strip() and text.strip() not in tokenizer.decode(tokenizer.encode(text)):
        raise UserError(
            f"model.data.chat_prompt_tokens.{name}={text!r} cannot be written by this tokenizer",
            fix="choose text that it knows, e.g. <extra_id_1>, or set model.data.chat_template=tokenizer",
        )
