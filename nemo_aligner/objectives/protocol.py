# SPDX-License-Identifier: Apache-2.0
"""The interface between an objective and a model."""

import enum
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from nemo_aligner.batch import TokenBatch, Unit

Metrics = dict[str, tuple[Tensor, Tensor]]
"""{name: (sum, count)}, both scalars: means are made once, when all ranks and micro-batches are summed."""

Sums = dict[str, tuple[float, float]]
"""{name: (sum, count)} over a global batch; run/metrics.py makes means of them."""


class Wants(enum.Enum):
    """The model outputs that an objective may want; a language model's are per token, over the whole vocabulary."""

    LOGPROBS = "logprobs"
    ENTROPY = "entropy"
    TOPK = "topk"
    REWARDS = "rewards"  # of a reward model, per sequence
    VALUES = "values"  # of a critic, per token


@dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """The wanted fields, others None. Every tensor speaks of position t by token t; 0 outside the loss mask."""

    logprobs: Tensor | None = None  # [B, S] float
    entropy: Tensor | None = None  # [B, S] float, of the distribution that token t was drawn from
    topk_logprobs: Tensor | None = None  # [B, S, K] float, descending; or of CandidateObjective.candidates
    topk_ids: Tensor | None = None  # [B, S, K] int64
    rewards: Tensor | None = None  # [N, A] float: attributes of each sequence; A = 1 for a plain reward
    values: Tensor | None = None  # [B, S] float, of the state before token t


class Objective(Protocol):
    """A loss, as a function of what a model says of a batch. Pure: no model, no process group, no file."""

    @property
    def wants(self) -> frozenset[Wants]:
        """The model outputs that it needs."""
        ...

    @property
    def unit(self) -> Unit:
        """The unit that the loss is a mean over."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names that a call returns, in any order."""
        ...

    def __call__(self, output: ModelOutput, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """The loss as a sum over its unit, and metrics as (sum, count)."""
        ...


@runtime_checkable
class LinearObjective(Objective, Protocol):
    """A loss that is linear in the log-probs: its gradient by them is known before the forward.

    It gets the gradient in one pass over the head.
    """

    def logprob_grad(self, batch: TokenBatch) -> Tensor:
        """[B, S]: dL/dlogprobs."""
        ...


@runtime_checkable
class TopKObjective(Objective, Protocol):
    """Wants the most likely tokens."""

    @property
    def top_k(self) -> int:
        """K of ``Wants.TOPK``."""
        ...


@runtime_checkable
class CandidateObjective(Objective, Protocol):
    """A loss that wants the log-probs of tokens that the batch names."""

    def candidates(self, batch: TokenBatch) -> Tensor:
        """[B, S, K] int64: the tokens of ``Wants.TOPK``."""
        ...
