# SPDX-License-Identifier: Apache-2.0
"""Prompt and response, laid out by a template such as ``{input} {output}``, to tokens and mask."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from nemo_aligner.data.common_rows import Recognised, as_input_output
from nemo_aligner.data.config import SFTSplitConfig, unescape
from nemo_aligner.data.conversations import LEARNED_KEYS, is_trained
from nemo_aligner.data.records import PromptResponse, read_prompt_response
from nemo_aligner.data.row import Row, finish, most_tokens, split_bos
from nemo_aligner.data.tokenizer import Tokenizer, encode_after
from nemo_aligner.data.turns import continuation
from nemo_aligner.errors import UserError

# Spaces before a placeholder belong to its value, since most tokenizers join a space to the word after it.
_PLACEHOLDER = re.compile(r"( *)\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class _Piece:
    text: str  # literal text; for a placeholder the spaces before it
    key: str | None  # the placeholder's field


class PromptResponseLayout:
    """Turns a row's fields into one sample.

    The prompt's tokens are those that the prompt alone has when the model is asked later, the response's those that
    follow in the tokens of the whole text. In a row that is too long the fields are cut token by token.

    Args:
        tokenizer: where ids come from.
        cfg: template, truncation and special tokens.
        answer_only_loss: learn the response and EOS only; otherwise everything but BOS.

    Raises:
        UserError: the template, the truncation fields and the tokenizer do not go together.
    """

    def __init__(self, tokenizer: Tokenizer, cfg: SFTSplitConfig, *, answer_only_loss: bool) -> None:
        self._tokenizer = tokenizer
        self._cfg = cfg
        self._answer_only_loss = answer_only_loss
        self._pieces = _split_template(cfg)
        self._keys = template_keys(cfg)
        self._truncation_keys = _truncation_keys(cfg, self._keys)
        self._sep = _separator(tokenizer, cfg)
        self._template_at_most = most_tokens("".join(piece.text for piece in self._pieces)) + len(self._sep)
        self._recognised = Recognised(cfg.path)

    def read(self, row: Mapping[str, object]) -> PromptResponse:
        """The fields that the template needs; rows of other common forms are converted first."""
        return read_row(row, self._keys, self._recognised)

    def surely_fits(self, record: PromptResponse) -> bool:
        """True if the row surely makes one whole sample; nothing is tokenised."""
        longest = sum(most_tokens(value) for value in record.fields.values()) + self._template_at_most
        return longest <= self._cfg.max_seq_length and bool(record.fields[self._cfg.label_key].strip())

    def __call__(self, record: PromptResponse) -> list[Row]:
        """The sample; none where the prompt leaves no room. UserError if nothing of the response is left to learn."""
        cfg = self._cfg
        if (sample := self._whole(record.fields)) is not None:
            return [sample]
        pieces = self._tokenise(record.fields)
        bos = split_bos(pieces, tokenizer=self._tokenizer, add_bos=cfg.add_bos)
        eos = self._take_eos(pieces[-1])
        num_response = len(pieces[-1])
        room = cfg.max_seq_length - len(bos) - len(self._sep) - len(eos)
        truncated = self._fit(pieces, room)
        if (num_response and not pieces[-1]) or room < sum(map(len, pieces)):
            return []
        prompt = [*(token for piece in pieces[:-1] for token in piece), *self._sep]
        response = [*pieces[-1], *eos]
        return [self._row(bos, prompt, response, truncated=truncated)]

    def _whole(self, values: Mapping[str, str]) -> Row | None:
        """The sample of a row that needs no cut; None for one that does."""
        texts = self._texts(values)
        prompt, response = "".join(texts[:-1]), texts[-1]
        ids = self._tokenizer.encode(prompt) if prompt else []
        pieces = [ids, continuation(self._tokenizer, prompt, ids, response) if response else []]
        bos = split_bos(pieces, tokenizer=self._tokenizer, add_bos=self._cfg.add_bos)
        eos = self._take_eos(pieces[1])
        prompt_ids, response_ids = [*pieces[0], *self._sep], [*pieces[1], *eos]
        if len(bos) + len(prompt_ids) + len(response_ids) > self._cfg.max_seq_length:
            return None
        return self._row(bos, prompt_ids, response_ids, truncated=False)

    def _row(self, bos: list[int], prompt: list[int], response: list[int], *, truncated: bool) -> Row:
        mask = [False] * len(bos) + [not self._answer_only_loss] * len(prompt) + [True] * len(response)
        tokens, limit = [*bos, *prompt, *response], self._cfg.max_seq_length
        return finish(tokens, mask, truncated=truncated, max_seq_length=limit)

    def _texts(self, values: Mapping[str, str]) -> list[str]:
        """The text of each piece; a value without its outer spaces, and nothing where it is empty."""
        texts = []
        for piece in self._pieces:
            value = "" if piece.key is None else values[piece.key].strip(" ")
            texts.append(piece.text + value if value or piece.key is None else "")
        return texts

    def _tokenise(self, values: Mapping[str, str]) -> list[list[int]]:
        ids: list[list[int]] = []
        for text in self._texts(values):
            if not text:
                ids.append([])
            elif any(ids):
                ids.append(encode_after(self._tokenizer, text))
            else:
                ids.append(self._tokenizer.encode(text))
        return ids

    def _take_eos(self, response: list[int]) -> list[int]:
        """EOS to end with, taken off the response's own end if its text was written with one."""
        if not self._cfg.add_eos:
            return []
        while response and response[-1] == self._tokenizer.eos_id:
            response.pop()
        return [self._tokenizer.eos_id]

    def _fit(self, pieces: list[list[int]], room: int) -> bool:
        """Cut the truncation fields, then the response's end, to ``room`` tokens; whether that was needed."""
        excess = sum(map(len, pieces)) - room
        if excess <= 0:
            return False
        chosen = [i for i, piece in enumerate(self._pieces) if piece.key in self._truncation_keys]
        for i, cut in zip(chosen, _shares([len(pieces[i]) for i in chosen], excess), strict=True):
            kept = len(pieces[i]) - cut
            pieces[i] = pieces[i][:kept] if self._cfg.truncation_method == "right" else pieces[i][cut:]
        excess = sum(map(len, pieces)) - room
        if excess > 0:
            pieces[-1] = pieces[-1][: max(len(pieces[-1]) - excess, 0)]
        return True


def _shares(lengths: Sequence[int], excess: int) -> list[int]:
    """Tokens that each field loses, ``excess`` in all if there are so many: equal shares, or all it has."""
    cuts = [0] * len(lengths)
    by_length = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for done, i in enumerate(by_length):
        cuts[i] = min(lengths[i], excess // (len(lengths) - done))
        excess -= cuts[i]
    return cuts


def read_row(row: Mapping[str, object], keys: Sequence[str], recognised: Recognised) -> PromptResponse:
    """The fields ``keys`` of a row; see :meth:`PromptResponseLayout.read`.

    Raises:
        UserError: one of them is missing or no string, or a key that carries meaning would be dropped.
    """
    flags = {key: row[key] for key in LEARNED_KEYS if key in row and key not in keys}
    row = {key: value for key, value in row.items() if key not in flags}
    row = as_input_output(row, keys=keys, recognised=recognised)
    return replace(read_prompt_response(row, keys=keys), masked=not is_trained(flags))


def template_keys(cfg: SFTSplitConfig) -> tuple[str, ...]:
    """The fields that the prompt template names, in its order.

    Raises:
        UserError: it does not end with the response.
    """
    return tuple(dict.fromkeys(piece.key for piece in _split_template(cfg) if piece.key is not None))


def _split_template(cfg: SFTSplitConfig) -> list[_Piece]:
    template, ending = unescape(cfg.prompt_template), f"{{{cfg.label_key}}}"
    if not template.endswith(ending) or template.count(ending) != 1:
        raise UserError(
            f"prompt_template={template!r} does not end with its one {ending}, the response",
            fix=f"end prompt_template with {ending}, or set label_key to the field that it ends with",
        )
    pieces, end = [], 0
    for match in _PLACEHOLDER.finditer(template):
        if match.start() > end:
            pieces.append(_Piece(template[end : match.start()], None))
        pieces.append(_Piece(match[1], match[2]))
        end = match.end()
    return pieces


def _truncation_keys(cfg: SFTSplitConfig, keys: Sequence[str]) -> frozenset[str]:
    chosen = frozenset(name.strip() for name in (cfg.truncation_field or "").split(",") if name.strip())
    if not chosen <= set(keys):
        raise UserError(
            f"truncation_field={cfg.truncation_field!r} names {sorted(chosen - set(keys))}, "
            f"but prompt_template={cfg.prompt_template!r} has {sorted(keys)}",
            fix="name fields of prompt_template, separated by commas, or null",
        )
    return chosen


def _separator(tokenizer: Tokenizer, cfg: SFTSplitConfig) -> list[int]:
    if not cfg.add_sep:
        return []
    if tokenizer.sep_id is None:
        raise UserError("add_sep=True, but the tokenizer has no separator token", fix="set add_sep=False")
    return [tokenizer.sep_id]
