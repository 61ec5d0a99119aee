# SPDX-License-Identifier: Apache-2.0
"""The data types that flow between data, models and objectives. Depends on torch alone.

One convention holds everywhere: **position t speaks of token t**. ``logprobs[b, t]`` is
``log p(tokens[b, t] | tokens[b, :t])`` and 0 at the start of every sequence; ``mask[b, t]`` says that token t
is learned from. Every per-token tensor is ``[B, S]``. The shift by one happens in ``models/gpt/view.py`` alone.

Shapes: B rows, S positions, N sequences (N = B unless packed).
"""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound="TokenBatch")


class Unit(enum.Enum):
    """What a loss is a mean of: its denominator is counted over the whole global batch."""

    TOKEN = "token"
    SEQUENCE = "sequence"
    PAIR = "pair"
    LABEL = "label"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Rows of tokens, right padded; or, with ``cu_seqlens``, one row that holds N sequences end to end."""

    rows_per_sample: ClassVar[int] = 1  # sequences that one line of data makes

    tokens: Tensor  # [B, S] int64, right padded
    mask: Tensor  # [B, S] bool, tokens that are learned from
    lengths: Tensor  # [N] int64, tokens in each sequence, prompt and answer
    cu_seqlens: Tensor | None = (
        None  # [N + 1] int32, set when packed: then B == 1 and the tail after it is padding
    )

    def __post_init__(self) -> None:
        assert self.tokens.ndim == 2 and self.mask.shape == self.tokens.shape, (
            self.tokens.shape,
            self.mask.shape,
        )
        assert self.cu_seqlens is None or self.tokens.shape[0] == 1, "a packed batch has one row"

    @property
    def num_rows(self) -> int:
        """B."""
        return self.tokens.shape[0]

    @property
    def seq_length(self) -> int:
        """S."""
        return self.tokens.shape[1]

    def ends(self) -> tuple[Tensor, Tensor]:
        """([N] row, [N] position) of each sequence's last token."""
        if self.cu_seqlens is None:
            return torch.arange(self.num_rows, device=self.tokens.device), self.lengths - 1
        last = self.cu_seqlens[1:].long() - 1
        return torch.zeros_like(last), last

    def starts(self) -> Tensor:
        """[B, S] bool: the first token of every sequence, which nothing predicts."""
        starts = torch.zeros_like(self.mask)
        if self.cu_seqlens is None:
            starts[:, 0] = True
        else:
            starts[0, self.cu_seqlens[:-1].long()] = True
        return starts

    def positions(self) -> Tensor:
        """[B, S] int64: the position of each token within its own sequence."""
        index = torch.arange(self.seq_length, device=self.tokens.device)
        if self.cu_seqlens is None:
            return index.expand(self.num_rows, -1)
        return (index - self.cu_seqlens[:-1].long()[self.sequence_ids()[0]])[None]

    def sequence_ids(self) -> Tensor:
        """[B, S] int64: which sequence a token belongs to; padding after the last one counts as the last."""
        if self.cu_seqlens is None:
            return torch.arange(self.num_rows, device=self.tokens.device)[:, None].expand(-1, self.seq_length)
        index = torch.arange(self.seq_length, device=self.tokens.device)
        ids = torch.bucketize(index, self.cu_seqlens[1:].long(), right=True)
        return ids.clamp_(max=self.lengths.numel() - 1)[None]

    def per_sequence(self, x: Tensor) -> Tensor:
        """[B, S] -> [N]: the sum over each sequence's learned tokens, padded and packed alike."""
        total = torch.zeros(self.lengths.numel(), dtype=x.dtype, device=x.device)
        return total.index_add(0, self.sequence_ids().reshape(-1), (x * self.mask).reshape(-1))

    def learned(self) -> Tensor:
        """[B, S] bool: the positions that have a prediction and are learned from."""
        return self.mask & ~self.starts()

    def count(self, unit: Unit) -> Tensor:
        """[] int64: the number of units in this batch, the loss's share of the global denominator."""
        learned = self.learned()
        match unit:
            case Unit.TOKEN:
                return learned.sum()
            case Unit.SEQUENCE:
                return (self.per_sequence(learned.long()) > 0).sum()
            case Unit.PAIR:
                # Sequences 2i and 2i + 1; a pair that only fills up learns nothing.
                return (self.per_sequence(learned.long()).view(-1, 2) > 0).all(1).sum()
            case Unit.LABEL:
                raise AssertionError(f"{type(self).__name__} has no labels")

    def split(self, rows: int) -> list[Self]:
        """Micro-batches of ``rows`` rows each; the number of rows must divide by it."""
        assert self.cu_seqlens is None, "a packed row is already one micro-batch"
        assert self.num_rows % rows == 0, (self.num_rows, rows)
        parts: dict[str, Sequence[Tensor]] = {
            field.name: torch.split(value, rows)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return [
            replace(self, **{name: chunks[i] for name, chunks in parts.items()})
            for i in range(self.num_rows // rows)
        ]

    def take(self, rows: Sequence[int] | slice) -> Self:
        """The batch of these rows, in this order."""
        assert self.cu_seqlens is None, "a packed row holds several sequences"
        index = rows if isinstance(rows, slice) else torch.tensor(rows, dtype=torch.int64)
        return self._changed(lambda x: x[index])

    def filled(self, num_rows: int) -> Self:
        """The batch with rows that only fill up: one token, from which nothing is learned."""
        missing = num_rows - self.num_rows
        assert missing >= 0, (num_rows, self.num_rows)
        if not missing:
            return self
        more = self._changed(lambda x: torch.cat([x, x.new_zeros(missing, *x.shape[1:])]))
        more.lengths[self.num_rows :] = 1
        return more

    def with_length(self, seq_length: int, *, pad_id: int = 0) -> Self:
        """The batch with rows of ``seq_length`` positions; what is cut off must be padding."""
        assert self.cu_seqlens is None and int(self.lengths.max()) <= seq_length, (self.lengths, seq_length)
        width = self.seq_length
        if seq_length <= width:
            return self._changed(lambda x: x[:, :seq_length] if _is_per_token(x, width) else x)
        more = self._changed(
            lambda x: torch.nn.functional.pad(x, (0, seq_length - width)) if _is_per_token(x, width) else x
        )
        more.tokens[:, width:] = pad_id
        return more

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Self:
        given = {f.name: change(x) for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        return replace(self, **given)

    def to(self, device: torch.device) -> Self:
        """The same batch on ``device``."""
        return self._changed(lambda x: x.to(device))

    @classmethod
    def from_rows(
        cls, rows: Sequence[tuple[Sequence[int], Sequence[bool]]], *, pad_id: int, seq_length: int
    ) -> "TokenBatch":
        """Rows of (token ids, learned flags), right padded to ``seq_length``.

        >>> TokenBatch.from_rows([([5, 6, 7], [False, True, True])], pad_id=0, seq_length=4).tokens
        tensor([[5, 6, 7, 0]])
        """
        tokens = torch.full((len(rows), seq_length), pad_id, dtype=torch.int64)
        mask = torch.zeros(len(rows), seq_length, dtype=torch.bool)
        for i, (ids, learned) in enumerate(rows):
            assert len(ids) == len(learned) <= seq_length, (len(ids), len(learned), seq_length)
            tokens[i, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            mask[i, : len(ids)] = torch.tensor(learned, dtype=torch.bool)
        lengths = torch.tensor([len(ids) for ids, _ in rows], dtype=torch.int64)
        return TokenBatch(tokens=tokens, mask=mask, lengths=lengths)


def _is_per_token(x: Tensor, width: int) -> bool:
    # The only fields with two sizes, of batches whose rows are whole sequences, are per token.
    return x.ndim == 2 and x.shape[1] == width


def concatenated(batches: Sequence[T]) -> T:
    """The rows of several batches in one, as wide as the widest."""
    filled = [batch for batch in batches if batch.num_rows] or batches[:1]
    width = max(batch.seq_length for batch in filled)
    parts = [batch.with_length(width) if batch.num_rows else batch for batch in filled]
    names = [f.name for f in fields(parts[0]) if isinstance(getattr(parts[0], f.name), Tensor)]
    return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceBatch(TokenBatch):
    """Pairs: sequence 2i is the chosen answer, 2i + 1 the rejected one to the same prompt."""

    rows_per_sample: ClassVar[int] = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredBatch(TokenBatch):
    """Sequences that people have judged."""

    attributes: Tensor  # [N, A] float, NaN where an attribute was not judged

    def judged(self) -> Tensor:
        """[N, A] bool: attributes that people have judged, of sequences that do not only fill up."""
        return ~self.attributes.isnan() & (self.per_sequence(self.learned().long()) > 0)[:, None]

    def count(self, unit: Unit) -> Tensor:
        """As for other batches; labels are the attributes that were judged."""
        return self.judged().sum() if unit is Unit.LABEL else TokenBatch.count(self, unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueBatch(TokenBatch):
    """What a critic learns from; ``mask`` is that of the answers."""

    values: Tensor  # [B, S] float, the critic's when the answers were written
    returns: Tensor  # [B, S] float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A text that a sampler is to answer."""

    tokens: Sequence[int]
    number: int  # the prompt's, in all of a step's prompts; answers to one prompt share it
    sample: int = 0  # which of the answers to it this one is to be
    max_length: int | None = None  # tokens of the answer; None: as many as the sampler allows


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout(TokenBatch):
    """Answers as a sampler wrote them; ``mask`` is that of the answers, their EOS included."""

    prompt_lengths: Tensor  # [B] int64
    finished: Tensor  # [B] bool: ended by EOS or a stop string, not by the length limit
    group: Tensor  # [B] int64: the prompt's number; answers to one prompt share it
    sampler_logprobs: Tensor  # [B, S] float: what the sampler believed

    def prompt(self, row: int) -> list[int]:
        """The tokens that were there before."""
        return [int(token) for token in self.tokens[row, : self.prompt_lengths[row]]]

    def answer(self, row: int) -> list[int]:
        """The tokens that were written in a row, its end among them."""
        return [int(token) for token in self.tokens[row][self.mask[row]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored(Rollout):
    """Answers with all that is known of them before any update."""

    logprobs: Tensor  # [B, S] float: the policy's, by the trainer
    reference_logprobs: Tensor  # [B, S] float: the initial policy's
    rewards: Tensor  # [B] float
    values: Tensor  # [B, S] float: of the state before each token; zeros where there is no critic


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience(TokenBatch):
    """What an update of the policy and of the critic needs, and nothing else."""

    logprobs: Tensor  # [B, S] float: the policy's before the update
    reference_logprobs: Tensor  # [B, S] float
    sampler_logprobs: Tensor  # [B, S] float
    advantages: Tensor  # [B, S] float
    returns: Tensor  # [B, S] float
    values: Tensor  # [B, S] float
