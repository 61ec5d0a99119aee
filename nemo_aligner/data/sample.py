# SPDX-License-Identifier: Apache-2.0
"""Tokenised rows, and how they are shown to people. Knows neither files nor templates."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from nemo_aligner.data.tokenizer import Tokenizer
from nemo_aligner.errors import UserError

# A NUL byte makes a log a binary file, an escape character colours the terminal.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")

_LONGEST_SHOWN = 1000  # characters of one run of tokens; the middle of a longer one is left out


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The tokens of one row."""

    tokens: list[int]  # prompt and answer, BOS and EOS included
    mask: list[bool]  # as long as tokens: which of them are learned
    truncated: bool  # whether something was cut to fit max_seq_length

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.mask), (len(self.tokens), len(self.mask))

    @property
    def num_tokens(self) -> int:
        """The length of its sequence."""
        return len(self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonSample:
    """The tokens of a pair of answers, each with the prompt before it."""

    chosen: list[int]
    rejected: list[int]
    truncated: bool = False  # pairs are left out where they are too long

    @property
    def num_tokens(self) -> int:
        """The length of the longer one."""
        return max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSample:
    """The tokens of a judged answer and its prompt."""

    tokens: list[int]
    attributes: tuple[float, ...]  # NaN where an attribute was not judged
    truncated: bool = False  # rows are left out where they are too long

    @property
    def num_tokens(self) -> int:
        """The length of its sequence."""
        return len(self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredPairSample:
    """Two judged answers to one prompt."""

    first: ScoredSample
    second: ScoredSample
    truncated: bool = False  # pairs are left out where they are too long

    @property
    def num_tokens(self) -> int:
        """The length of the longer one."""
        return max(self.first.num_tokens, self.second.num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSample:
    """A prompt to be answered."""

    text: str
    tokens: list[int]
    row: Mapping[str, object] = field(default_factory=dict)  # the JSON object that it stands in
    truncated: bool = False  # prompts are left out where they are too long

    @property
    def num_tokens(self) -> int:
        """The length of the prompt."""
        return len(self.tokens)


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

    def at_most(self, text: str) -> int:
        """As many tokens as ``text`` can have, told without tokenising it."""
        return most_tokens(text)


def most_tokens(text: str) -> int:
    """As many tokens as ``text`` can have, BOS, EOS and a space before it included."""
    # A token is at least one byte of the text as the tokenizer normalises it, and no form is longer than NFKD.
    longest = (
        len(text) if text.isascii() else max(map(_num_bytes, (text, unicodedata.normalize("NFKD", text))))
    )
    return longest + 3


def _num_bytes(text: str) -> int:
    return len(text.encode())


def finish(tokens: list[int], mask: list[bool], *, truncated: bool, max_seq_length: int) -> Sample:
    """The sample, after the checks that every layout shares: it fits, and something in it is learned.

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
            cure="raise max_seq_length or shorten the row"
            if truncated
            else "give the row an answer, or remove it",
        )
    return Sample(tokens=tokens, mask=mask, truncated=truncated)


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
                "add_bos=True, but the tokenizer has no beginning-of-sequence token", cure="set add_bos=False"
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


def describe(sample: Sample, tokenizer: Tokenizer) -> str:
    """The sample as text, what is learned between ⟦ and ⟧, and control characters as \\x00."""
    text = ""
    for learned, run in groupby(range(len(sample.tokens)), key=lambda i: sample.mask[i]):
        indices = list(run)
        piece = _decode_run(tokenizer, sample.tokens, indices[0], indices[-1] + 1)
        text += f"⟦{piece}⟧" if learned else piece
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def _decode_run(tokenizer: Tokenizer, tokens: Sequence[int], start: int, stop: int) -> str:
    # Decoded together with what stands before, so that a run keeps the space that joins it to the last one.
    before, through = tokenizer.decode(tokens[:start]), tokenizer.decode(tokens[:stop])
    piece = through[len(before) :] if through.startswith(before) else tokenizer.decode(tokens[start:stop])
    if len(piece) <= _LONGEST_SHOWN:
        return piece
    half = _LONGEST_SHOWN // 2
    return f"{piece[:half]} [... {len(piece) - 2 * half} characters ...] {piece[-half:]}"
