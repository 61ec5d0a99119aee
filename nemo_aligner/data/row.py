# SPDX-License-Identifier: Apache-2.0
"""Rows in tokens, and how they are shown to people. Knows neither files nor templates."""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING

from nemo_aligner.data.tokenizer import Tokenizer
from nemo_aligner.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# A NUL byte makes a log a binary file, an escape character colours the terminal.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")

_LONGEST_SHOWN = 1000  # characters of one run of tokens; the middle of a longer one is left out


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSequence:
    """The tokens of one text."""

    tokens: list[int]  # prompt and response, BOS and EOS included
    loss_mask: list[bool]  # as long as tokens: which of them the loss counts

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.loss_mask), (len(self.tokens), len(self.loss_mask))

    def split(self) -> tuple[list[int], list[int]]:
        """(prompt, response) of tokens: what stands before the first loss token, and the rest."""
        border = self.loss_mask.index(True)
        return self.tokens[:border], self.tokens[border:]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of data in tokens: one sequence, or several that stay together, of a pair the chosen one first."""

    sequences: tuple[TokenSequence, ...]
    labels: tuple[tuple[float, ...], ...] = ()  # of each sequence: its attributes, NaN where one is unlabeled
    rewards: tuple[float, ...] = ()  # of each sequence, where the data give them
    reference_logprobs: tuple[float, ...] = ()  # of each sequence, where they are computed before training
    # of a single sequence's T loss tokens, where a teacher was asked before training: [T, K] log-probs, [T, K] tokens
    teacher: "tuple[Tensor, Tensor] | None" = None
    text: str = ""  # of a prompt
    extras: Mapping[str, object] = field(default_factory=dict)  # the JSON object that it stands in
    truncated: bool = False  # whether something was cut to fit max_seq_length

    @property
    def tokens(self) -> list[int]:
        """Those of its only sequence."""
        (sequence,) = self.sequences
        return sequence.tokens

    @property
    def num_tokens(self) -> int:
        """The length of its longest sequence."""
        return max(len(sequence.tokens) for sequence in self.sequences)

    def padding(self, pad_id: int) -> "Row":
        """A row of the same width that only fills a micro-batch: one token in each sequence, no loss, no label."""
        empty = TokenSequence(tokens=[pad_id], loss_mask=[False])
        return replace(
            self,
            sequences=(empty,) * len(self.sequences),
            labels=tuple((math.nan,) * len(labels) for labels in self.labels),
            teacher=None if self.teacher is None else (self.teacher[0][:0], self.teacher[1][:0]),
            text="",
            extras={},
            truncated=False,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoder:
    """A whole text to tokens: BOS once where it is wanted, EOS once where it is asked for."""

    tokenizer: Tokenizer
    add_bos: bool | None  # None: as the tokenizer does
    append_eos: bool

    def __call__(self, text: str, *, rendered: bool = False, append_eos: bool | None = None) -> list[int]:
        """The ids of ``text``; UserError where BOS is wanted of a tokenizer that has none.

        Args:
            rendered: a chat template wrote the text, and BOS where the model wants it.
            append_eos: for this text; None: as for all.
        """
        ids = self.tokenizer.encode(text)
        add_bos = bool(self.add_bos) if rendered else self.add_bos
        bos = split_bos([ids], tokenizer=self.tokenizer, add_bos=add_bos)
        wanted = self.append_eos if append_eos is None else append_eos
        eos = [self.tokenizer.eos_id] if wanted and ids[-1:] != [self.tokenizer.eos_id] else []
        return [*bos, *ids, *eos]


def most_tokens(text: str) -> int:
    """The most tokens that ``text`` can have, BOS, EOS and a space before it included."""
    # A token is at least one byte of the text as the tokenizer normalises it, and no form is longer than NFKD.
    if text.isascii():
        return len(text) + 3
    return max(len(form.encode()) for form in (text, unicodedata.normalize("NFKD", text))) + 3


def finish(tokens: list[int], mask: list[bool], *, truncated: bool, max_seq_length: int) -> Row:
    """The row of one sequence, after the checks that every layout shares: it fits, and something in it is learned.

    The first token is never learned, since nothing predicts it.

    Raises:
        UserError: nothing is learned.
    """
    assert len(tokens) <= max_seq_length, (len(tokens), max_seq_length)
    mask = [False, *mask[1:]]
    if not any(mask):
        why = f" within max_seq_length={max_seq_length}" if truncated else ""
        raise UserError(
            f"no token of this row is learned{why}",
            fix="raise max_seq_length or shorten the row"
            if truncated
            else "give the row a response, or remove it",
        )
    return Row(sequences=(TokenSequence(tokens=tokens, loss_mask=mask),), truncated=truncated)


def split_bos(pieces: list[list[int]], *, tokenizer: Tokenizer, add_bos: bool | None) -> list[int]:
    """Take BOS off the text's start and return what to start with instead: BOS once, or nothing.

    Args:
        pieces: the text's token ids, in order; changed where the text itself begins with BOS.
        tokenizer: knows which token is BOS.
        add_bos: whether to start with BOS where the text does not; None: as the tokenizer does.

    Raises:
        UserError: BOS is wanted and the tokenizer has none.
    """
    bos = tokenizer.bos_id
    if bos is None:
        if add_bos:
            raise UserError(
                "add_bos=True, but the tokenizer has no beginning-of-sequence token", fix="set add_bos=False"
            )
        return []
    written = False
    for piece in pieces:
        while piece and piece[0] == bos:
            written = True
            piece.pop(0)
        if piece:
            break
    wanted = tokenizer.adds_bos if add_bos is None else add_bos
    return [bos] if wanted or written else []


def describe(row: Row, tokenizer: Tokenizer) -> str:
    """The row's first sequence as text, loss tokens between ⟦ and ⟧, and control characters as \\x00."""
    text, sequence = "", row.sequences[0]
    for counts, run in groupby(range(len(sequence.tokens)), key=lambda i: sequence.loss_mask[i]):
        indices = list(run)
        piece = _decode_run(tokenizer, sequence.tokens, indices[0], indices[-1] + 1)
        text += f"⟦{piece}⟧" if counts else piece
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def _decode_run(tokenizer: Tokenizer, tokens: Sequence[int], start: int, stop: int) -> str:
    # Decoded together with what stands before, so that a run keeps the space that joins it to the last one.
    before, through = tokenizer.decode(tokens[:start]), tokenizer.decode(tokens[:stop])
    piece = through[len(before) :] if through.startswith(before) else tokenizer.decode(tokens[start:stop])
    if len(piece) <= _LONGEST_SHOWN:
        return piece
    half = _LONGEST_SHOWN // 2
    return f"{piece[:half]} [... {len(piece) - 2 * half} characters ...] {piece[-half:]}"
