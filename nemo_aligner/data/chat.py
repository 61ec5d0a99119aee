# SPDX-License-Identifier: Apache-2.0
"""Conversations to tokens and mask: with NeMo's prompt tokens, or with the tokenizer's own chat template.

Both cut a conversation into parts of text that are learned or not; ``_lay_out`` makes the sample of them.
Neighbouring parts of one kind are tokenised as one text, so that a prompt has the tokens that it will have
when the model is asked.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import groupby

from nemo_aligner.data.config import ChatPromptTokens, SFTSplitConfig
from nemo_aligner.data.conversations import Chat, Turn, read_chat
from nemo_aligner.data.sample import Sample, finish, split_bos
from nemo_aligner.data.tokenizer import Message, Tokenizer, encode_after
from nemo_aligner.errors import UserError

__all__ = ["PromptTokensLayout", "TemplateLayout"]

_ROLES = {"User": "user", "Assistant": "assistant"}  # NeMo's speakers as chat templates call them


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """A conversation as text, up to and including its last learned turn."""

    body: list[tuple[str, bool]]  # text and whether it is learned
    closing: str  # learned text that ends the last turn; kept when the body is cut


class PromptTokensLayout:
    """Lays out turns between prompt tokens, e.g. ``<extra_id_1>Assistant\\nHello\\n<extra_id_1>``.

    The system text, names and labels before a text are not learned. The ``turn_start`` after a learned turn
    is: there the model learns to stop. Turns after the last learned one are left out, as they teach nothing.

    Args:
        tokenizer: where ids come from.
        tokens: the text that marks turns.
        cfg: length and special tokens.

    Raises:
        UserError: the tokenizer cannot write one of the prompt tokens.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: ChatPromptTokens, cfg: SFTSplitConfig) -> None:
        self._tokenizer = tokenizer
        self._tokens = tokens.unescaped()
        self._cfg = cfg
        for name, text in asdict(self._tokens).items():
            _check_writable(tokenizer, name, text)

    def read(self, row: Mapping[str, object]) -> Chat:
        """A conversation of either layout."""
        return read_chat(row)

    def __call__(self, chat: Chat) -> Sample:
        """The sample; UserError if nothing of it is left to learn."""
        return _lay_out(self._parts(chat), self._tokenizer, self._cfg, add_bos=self._cfg.add_bos)

    def _parts(self, chat: Chat) -> _Parts:
        tokens = self._tokens
        body = [
            (f"{tokens.system_turn_start}System{tokens.end_of_name}{chat.system}{tokens.end_of_turn}", False)
        ]
        last = max(index for index in range(len(chat.turns)) if chat.learned(index))
        for index, turn in enumerate(chat.turns[: last + 1]):
            stops_previous = index > 0 and chat.learned(index - 1)
            learned = chat.learned(index)
            before, after = self._labels(turn, chat.kind)
            body += [
                (tokens.turn_start, stops_previous),
                (f"{turn.speaker}{tokens.end_of_name}{before}", False),
                (f"{turn.text}{tokens.end_of_turn}{after}", learned),
            ]
        return _Parts(body=body, closing=tokens.turn_start)

    def _labels(self, turn: Turn, kind: str | None) -> tuple[str, str]:
        """The label as it stands before and after a turn's text: in one place, or in none."""
        if turn.label is None or kind is None:
            return "", ""
        label = f"{self._tokens.label_start}{turn.label}{self._tokens.end_of_name}"
        return (label, "") if kind == "VALUE_TO_TEXT" else ("", label)


class TemplateLayout:
    """Lays out turns as the tokenizer's chat template does; the assistant's turns are learned.

    A turn is found by rendering the conversation up to it and through it. So the template must only ever add
    text: one that rewrites history (dropping earlier reasoning, say) is refused.

    Args:
        tokenizer: where the template and ids come from.
        cfg: length and special tokens.

    Raises:
        UserError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Tokenizer, cfg: SFTSplitConfig) -> None:
        if tokenizer.chat_template is None:
            raise UserError(
                "model.data.chat_template=tokenizer, but the tokenizer has no chat template",
                cure="set model.data.chat_template=prompt_tokens, or give a tokenizer that has a template",
            )
        self._tokenizer = tokenizer
        self._cfg = cfg

    def read(self, row: Mapping[str, object]) -> Chat:
        """A conversation of either layout, its speakers being those that templates know."""
        chat = read_chat(row)
        strange = sorted({turn.speaker for turn in chat.turns} - _ROLES.keys())
        if strange or chat.mask != "User":
            raise UserError(
                f"speakers {strange} and mask {chat.mask!r} have no place in the tokenizer's chat template"
                if strange
                else f"mask {chat.mask!r} would teach the user's turns",
                cure="name the speakers User and Assistant with mask User, or set "
                "model.data.chat_template=prompt_tokens",
            )
        if chat.kind is not None:
            raise UserError(
                f"type {chat.kind!r} asks for labels, which the tokenizer's chat template cannot show",
                cure="set model.data.chat_template=prompt_tokens",
            )
        return chat

    def __call__(self, chat: Chat) -> Sample:
        """The sample; UserError if the template rewrites history or nothing is left to learn."""
        # None lets the template decide: it writes BOS where the model wants it.
        return _lay_out(self._parts(chat), self._tokenizer, self._cfg, add_bos=bool(self._cfg.add_bos))

    def _parts(self, chat: Chat) -> _Parts:
        messages: list[Message] = [{"role": "system", "content": chat.system}] if chat.system else []
        body: list[tuple[str, bool]] = []
        done = marker = gap = ""
        for index, turn in enumerate(chat.turns):
            before = messages[:]
            messages.append({"role": _ROLES[turn.speaker], "content": turn.text})
            if not chat.learned(index):
                continue
            prompt = self._tokenizer.render_chat(before, add_generation_prompt=True)
            through = self._tokenizer.render_chat(messages)
            if not (prompt.startswith(done) and through.startswith(prompt)):
                raise UserError(
                    f"the tokenizer's chat template rewrites what stands before turn {index + 1}, so "
                    "training would see another conversation than the model does when it answers",
                    cure="split the conversation into one row per answer, use a template that only adds "
                    "text, or set model.data.chat_template=prompt_tokens",
                )
            body += [(marker, True), (gap + prompt[len(done) :], False)]
            text, marker, gap = _split_turn(through[len(prompt) :], turn.text)
            body.append((text, True))
            done = through
        return _Parts(body=body, closing=marker)


def _split_turn(rendered: str, content: str) -> tuple[str, str, str]:
    """Cut a rendered turn into its text, its end-of-turn marker, and white space that belongs to the next.

    White space without a marker stays with the text, as it is all that ends the turn; so does everything
    where the template has changed the content.
    """
    content = content.strip()
    start = rendered.find(content)
    end = start + len(content)
    marker = rendered[end:].rstrip()
    if start < 0 or not marker:
        return rendered, "", ""
    return rendered[:end], marker, rendered[end + len(marker) :]


def _lay_out(parts: _Parts, tokenizer: Tokenizer, cfg: SFTSplitConfig, *, add_bos: bool | None) -> Sample:
    """Tokenise, add BOS and EOS, and cut what is too long from the end, so that a learned turn comes last."""
    runs = [
        ("".join(text for text, _ in run), learned)
        for learned, run in groupby((part for part in parts.body if part[0]), key=lambda part: part[1])
    ]
    pieces = [tokenizer.encode(runs[0][0]), *(encode_after(tokenizer, text) for text, _ in runs[1:])]
    bos = split_bos(pieces, tokenizer=tokenizer, add_bos=add_bos)
    tokens, mask = bos[:], [False] * len(bos)
    for piece, (_, learned) in zip(pieces, runs, strict=True):
        tokens += piece
        mask += [learned] * len(piece)
    stop = encode_after(tokenizer, parts.closing) if parts.closing else []
    closing = stop if not cfg.add_eos or stop[-1:] == [tokenizer.eos_id] else [*stop, tokenizer.eos_id]
    truncated = len(tokens) + len(closing) > cfg.max_seq_length
    if truncated:
        tokens, mask = _cut(tokens, mask, max(cfg.max_seq_length - len(closing), 0), stop)
        # Without any of its answer, a row would teach to end where the prompt was cut.
        closing = closing if any(mask[1:]) else []
    return finish(
        tokens + closing, mask + [True] * len(closing), truncated=truncated, max_seq_length=cfg.max_seq_length
    )


def _cut(tokens: list[int], mask: list[bool], length: int, stop: list[int]) -> tuple[list[int], list[bool]]:
    """At most the first ``length`` tokens, ending with a learned one that is not the end-of-turn marker."""
    while length and not mask[length - 1]:
        length -= 1
    if stop and tokens[:length][-len(stop) :] == stop:
        length -= len(stop)
    return tokens[:length], mask[:length]


def _check_writable(tokenizer: Tokenizer, name: str, text: str) -> None:
    if text.strip() and text.strip() not in tokenizer.decode(tokenizer.encode(text)):
        raise UserError(
            f"model.data.chat_prompt_tokens.{name}={text!r} cannot be written by this tokenizer",
            cure="choose text that it knows, e.g. <extra_id_1>, or set model.data.chat_template=tokenizer",
        )
