# SPDX-License-Identifier: Apache-2.0
"""The data types that flow between data, models and objectives; those of the online loop are in ``rollout_batch.py``.

Depends on torch alone.

One convention holds everywhere: **position t speaks of token t**. ``logprobs[b, t]`` is
``log p(tokens[b, t] | tokens[b, :t])`` and 0 at the start of every sequence; ``loss_mask[b, t]`` says that
token t counts in the loss. Every per-token tensor is ``[B, S]``, or ``[B, S, K]``; outside ``loss_mask`` its numbers
mean nothing: who makes it writes 0 there, and who reads it masks first. The shift by one happens in
``models/gpt/head_projection.py``, and for NeMo-Aligner's protocol in ``serving/wire.py``.

Shapes: B rows, S positions, N sequences (N = B unless packed), A attributes of a sequence, K tokens that a teacher
names in each place; float is float32. A row of a batch is one sequence, or many where it is packed; a row of data may
be several sequences, as a pair is.
"""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Self, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

T = TypeVar("T", bound="TokenBatch")
# Marks a field of two dimensions whose second is not S, though it may be as long.
_PER_SEQUENCE = "per_sequence"


class Unit(enum.Enum):
    """The unit of a loss: its denominator is counted over the whole global batch."""

    TOKEN = "token"
    SEQUENCE = "sequence"
    PAIR = "pair"
    LABEL = "label"
    CONSTANT = "constant"  # a response, whose tokens are summed


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Rows of tokens, right padded; or, :meth:`packed`, one row that holds N sequences end to end."""

    # settings count rows of data, a pair being one of two sequences; methods here count the batch's rows
    sequences_per_row: ClassVar[int] = 1

    tokens: Tensor  # [B, S] int64, right padded
    # [B, S] bool, the loss tokens; of a sequence's first token, which nothing predicts, it is not read
    loss_mask: Tensor
    lengths: Tensor  # [N] int64, tokens in each sequence, prompt and response
    # [N + 1] int32, only of packed rows (model.data.packing): each sequence's start, and the end of the last one; the
    # rest is padding
    cu_seqlens: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.tokens.ndim == 2 and self.loss_mask.shape == self.tokens.shape, (
            self.tokens.shape,
            self.loss_mask.shape,
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
        starts = torch.zeros_like(self.loss_mask)
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
        """[B, S] -> [N]: the sum over each sequence's loss tokens, padded and packed alike."""
        total = torch.zeros(self.lengths.numel(), dtype=x.dtype, device=x.device)
        return total.index_add(
            0, self.sequence_ids().reshape(-1), torch.where(self.loss_tokens(), x, 0).reshape(-1)
        )

    def real_tokens(self) -> Tensor:
        """[B, S] bool: the tokens of sequences, without padding."""
        ends = self.lengths[:, None] if self.cu_seqlens is None else self.cu_seqlens[-1]
        return torch.arange(self.seq_length, device=ends.device)[None] < ends

    def loss_tokens(self) -> Tensor:
        """[B, S] bool: those that ``loss_mask`` marks, but the first token of every sequence."""
        return self.loss_mask & ~self.starts()

    def loss_lengths(self) -> Tensor:
        """[N] int64: the loss tokens of each sequence."""
        return self.per_sequence(self.loss_tokens().long())

    def real_sequences(self) -> Tensor:
        """[N] bool: True for sequences of two tokens or more; a padding row has one."""
        return self.lengths > 1

    def real_pairs(self) -> Tensor:
        """[N / 2] bool: of sequences 2i and 2i + 1, whether both have loss tokens; padding rows are no pair."""
        return (self.loss_lengths().view(-1, 2) > 0).all(1)

    def token_weights(self, unit: Unit) -> Tensor:
        """[B, S] float: the weight of each loss token in a mean of tokens, of sequences' means, or of their sums."""
        loss_tokens = self.loss_tokens().float()
        if unit in (Unit.TOKEN, Unit.CONSTANT):
            return loss_tokens
        assert unit is Unit.SEQUENCE, unit
        lengths = self.loss_lengths().clamp(min=1).float()
        return loss_tokens / lengths[self.sequence_ids()]

    def count(self, unit: Unit) -> Tensor:
        """[] int64: the number of units in this batch, the loss's share of the global denominator."""
        match unit:
            case Unit.TOKEN:
                return self.loss_tokens().sum()
            case Unit.SEQUENCE:
                return (self.loss_lengths() > 0).sum()
            case Unit.PAIR:
                return self.real_pairs().sum()
            case Unit.CONSTANT:
                return self.real_sequences().sum()
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
        """The batch of these rows of it, in this order; of pairs, who calls keeps 2i and 2i + 1 together."""
        assert self.cu_seqlens is None, "a packed row holds several sequences"
        index = rows if isinstance(rows, slice) else torch.tensor(rows, dtype=torch.int64)
        return self._changed(lambda x: x[index])

    def pad_rows(self, num_rows: int) -> Self:
        """The batch with padding rows: one token each, no loss token, and other fields of 0, which nobody reads."""
        missing = num_rows - self.num_rows
        assert self.cu_seqlens is None and missing >= 0, (num_rows, self.num_rows)
        if not missing:
            return self
        more = self._changed(lambda x: torch.cat([x, x.new_zeros(missing, *x.shape[1:])]))
        more.lengths[self.num_rows :] = 1
        return more

    def with_length(self, seq_length: int, *, pad_id: int = 0) -> Self:
        """The batch with rows of ``seq_length`` positions; what is cut off must be padding."""
        assert self.cu_seqlens is None and int(self.lengths.max()) <= seq_length, (self.lengths, seq_length)
        width = self.seq_length
        given = {
            name: x[:, :seq_length]
            if seq_length <= width
            else pad(x, (*(0, 0) * (x.ndim - 2), 0, seq_length - width))
            for name, x in self._per_token().items()
        }
        if seq_length > width:
            given["tokens"][:, width:] = pad_id
        return replace(self, **given)

    def _per_token(self) -> dict[str, Tensor]:
        """{name: [B, S, ...]} of the fields that speak of tokens."""
        names = (spec.name for spec in fields(self) if not spec.metadata.get(_PER_SEQUENCE))
        tensors = {name: x for name in names if isinstance(x := getattr(self, name), Tensor)}
        return {name: x for name, x in tensors.items() if x.ndim >= 2 and x.shape[1] == self.seq_length}

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Self:
        given = {f.name: change(x) for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        return replace(self, **given)

    def packed(self, seq_length: int, *, pad_id: int = 0) -> Self:
        """The same sequences end to end in one row of ``seq_length`` tokens, whose tail is padding.

        >>> batch = TokenBatch.from_rows([([5, 6], [False, True]), ([7], [False])], pad_id=0, seq_length=3)
        >>> row = batch.packed(4)
        >>> row.tokens.tolist(), row.cu_seqlens.tolist(), row.positions().tolist()
        ([[5, 6, 7, 0]], [0, 2, 3], [[0, 1, 0, 1]])
        """
        assert self.cu_seqlens is None, "it is packed"
        real, bounds = (
            self.real_tokens(),
            torch.cat([self.lengths.new_zeros(1), self.lengths.cumsum(0)]).int(),
        )
        tail = seq_length - int(bounds[-1])
        assert tail >= 0, (bounds, seq_length)
        given = {
            name: torch.cat([x[real], x.new_zeros(tail, *x.shape[2:])])[None]
            for name, x in self._per_token().items()
        }
        given["tokens"][:, seq_length - tail :] = pad_id
        return replace(self, cu_seqlens=bounds, **given)

    def extended(self, kind: type[T], **added: Tensor) -> T:
        """The same sequences as a batch of ``kind``, a subclass, with the fields that it adds."""
        return kind(**{spec.name: getattr(self, spec.name) for spec in fields(self)}, **added)

    def to(self, device: torch.device) -> Self:
        """The same batch on ``device``."""
        return self._changed(lambda x: x.to(device))

    @staticmethod
    def from_rows(
        rows: Sequence[tuple[Sequence[int], Sequence[bool]]], *, pad_id: int, seq_length: int
    ) -> "TokenBatch":
        """Rows of (token ids, flags of loss tokens), right padded to ``seq_length``.

        >>> TokenBatch.from_rows([([5, 6, 7], [False, True, True])], pad_id=0, seq_length=4).tokens
        tensor([[5, 6, 7, 0]])
        """
        tokens = torch.full((len(rows), seq_length), pad_id, dtype=torch.int64)
        mask = torch.zeros(len(rows), seq_length, dtype=torch.bool)
        for i, (ids, loss_tokens) in enumerate(rows):
            assert len(ids) == len(loss_tokens) <= seq_length, (len(ids), len(loss_tokens), seq_length)
            tokens[i, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            mask[i, : len(ids)] = torch.tensor(loss_tokens, dtype=torch.bool)
        lengths = torch.tensor([len(ids) for ids, _ in rows], dtype=torch.int64)
        return TokenBatch(tokens=tokens, loss_mask=mask, lengths=lengths)


def concatenated(batches: Sequence[T]) -> T:
    """The rows of several batches in one, as wide as the widest."""
    present = [batch for batch in batches if batch.num_rows] or batches[:1]
    width = max(batch.seq_length for batch in present)
    parts = [batch.with_length(width) if batch.num_rows else batch for batch in present]
    names = [f.name for f in fields(parts[0]) if isinstance(getattr(parts[0], f.name), Tensor)]
    return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceBatch(TokenBatch):
    """Pairs: sequence 2i is the chosen response, 2i + 1 the rejected one to the same prompt.

    As collated; ReferencedPairs once the reference's log-probs are known. Prompt 5 6, chosen 7 8, rejected 9:

    >>> rows = [([5, 6, 7, 8], [False, False, True, True]), ([5, 6, 9], [False, False, True])]
    >>> batch = TokenBatch.from_rows(rows, pad_id=0, seq_length=4)
    >>> pair = batch.extended(PreferenceBatch, given_rewards=torch.tensor([1.0, 0.0]))
    >>> pair.tokens.tolist(), pair.loss_lengths().tolist(), pair.real_pairs().tolist()
    ([[5, 6, 7, 8], [5, 6, 9, 0]], [2, 1], [True])
    """

    sequences_per_row: ClassVar[int] = 2

    # [N] float: the reward of each response: the data's, else a default; of a rollout's pairs, the rollout's. Only the
    # losses rpo_* read it
    given_rewards: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferencedPairs(PreferenceBatch):
    """Pairs with the reference model's log-probs."""

    # [N] float: the reference's log-probs, summed over a sequence's loss tokens: of its own distribution; in pairs of
    # a rollout, of the one drawn from, as ScoredRollout.reference_logprobs
    reference_sums: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MismatchedResponses(TokenBatch):
    """Sequence 2i is a prompt and its response, good or bad; 2i + 1 the same prompt and the response to another prompt.

    As collated. RatedResponses keeps sequences 2i; 2i + 1 only estimate the KL. Prompt 5 with its response 7, which is
    good, and prompt 6 with its own 8, which is bad:

    >>> rows = [([prompt, response], [False, True]) for prompt, response in ((5, 7), (5, 8), (6, 8), (6, 7))]
    >>> batch = TokenBatch.from_rows(rows, pad_id=0, seq_length=2)
    >>> mismatched = batch.extended(MismatchedResponses, good=torch.tensor([True, True, False, False]))
    >>> mismatched.take([0, 2]).tokens.tolist()
    [[5, 7], [6, 8]]
    """

    sequences_per_row: ClassVar[int] = 2

    good: Tensor  # [N] bool: alike for 2i and 2i + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RatedResponses(TokenBatch):
    """Responses that are good or bad, each once, with the reference model's log-probs and the KL to it."""

    good: Tensor  # [N] bool
    reference_sums: Tensor  # [N] float: as in ReferencedPairs
    # [N] float: one number N times, so that rows can be taken: the step's estimate of KL(policy || reference), nats, at
    # least 0
    kl_baseline: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherBatch(TokenBatch):
    """Sequences with the teacher's K most likely tokens at each loss token, given those before it; 0 elsewhere.

    With K = 2: where token 7 stands after 5 6, the teacher holds 9 to be 0.6 and 7 to be 0.3 likely; a tail of 0.1 is
    left for all other tokens:

    >>> batch = TokenBatch.from_rows([([5, 6, 7], [False, False, True])], pad_id=0, seq_length=3)
    >>> ids, logprobs = torch.zeros(1, 3, 2, dtype=torch.int64), torch.zeros(1, 3, 2)
    >>> ids[0, 2], logprobs[0, 2] = torch.tensor([9, 7]), torch.tensor([0.6, 0.3]).log()
    >>> batch = batch.extended(TeacherBatch, teacher_logprobs=logprobs, teacher_ids=ids)
    >>> batch.teacher_logprobs[batch.loss_tokens()].exp()
    tensor([[0.6000, 0.3000]])
    """

    teacher_logprobs: Tensor  # [B, S, K] float, descending
    teacher_ids: Tensor  # [B, S, K] int64: the tokens that teacher_logprobs are of


@dataclass(frozen=True, slots=True, kw_only=True)
class AttributeBatch(TokenBatch):
    """Sequences with attribute labels."""

    # [N, A] float, NaN where an attribute has no label
    attributes: Tensor = field(metadata={_PER_SEQUENCE: True})

    def labeled(self) -> Tensor:
        """[N, A] bool: attributes that have a label, in rows that are not padding."""
        return ~self.attributes.isnan() & (self.loss_lengths() > 0)[:, None]

    def count(self, unit: Unit) -> Tensor:
        """As for other batches; labels are the attributes that have one."""
        return self.labeled().sum() if unit is Unit.LABEL else TokenBatch.count(self, unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class LabeledPairs(AttributeBatch):
    """Pairs compared by their first label, which both sequences carry.

    A first label below 0 says that the first response is better, else the second; its absolute value says by how much.
    Further labels belong to each sequence. A = 2; the second response is better by 2, and has no label of its own:

    >>> rows = [([5, 6, 7], [False, False, True]), ([5, 6, 9], [False, False, True])]
    >>> batch = TokenBatch.from_rows(rows, pad_id=0, seq_length=3)
    >>> pair = batch.extended(LabeledPairs, attributes=torch.tensor([[2.0, 4.0], [2.0, float("nan")]]))
    >>> pair.labeled().tolist(), int(pair.count(Unit.PAIR)), int(pair.count(Unit.LABEL))
    ([[True, True], [True, False]], 1, 3)
    """

    sequences_per_row: ClassVar[int] = 2
