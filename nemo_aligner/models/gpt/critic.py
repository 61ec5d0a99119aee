# SPDX-License-Identifier: Apache-2.0
"""A GPT with a scalar head: a reward model, or a critic, behind the alignable interface."""

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_aligner.batch import TokenBatch
from nemo_aligner.models.gpt.heads import HeadConfig
from nemo_aligner.models.gpt.learner import GPTLearner
from nemo_aligner.models.gpt.model import GPT, InterleavedGPT
from nemo_aligner.models.gpt.weight_swap import SwappedWeights
from nemo_aligner.objectives.protocol import Wants
from nemo_aligner.parallel import collectives


@dataclass(frozen=True, kw_only=True)
class RewardScale:
    """From what the head gives to the reward that is served: (x @ weights - mean) / std."""

    weights: tuple[float, ...] | None = None  # of the attributes; None: they are not merged
    mean: float = 0.0
    std: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """[N, A] -> [N], or [N, A] where several attributes are not merged."""
        if self.weights is not None:
            x = (x * torch.tensor(self.weights, device=x.device, dtype=x.dtype)).sum(-1, keepdim=True)
        x = (x - self.mean) / self.std
        return x[:, 0] if x.shape[1] == 1 else x


@dataclass(frozen=True, kw_only=True)
class RewardWeights:
    """A reward model that shares its layers' place with a critic."""

    weights: SwappedWeights
    outputs: int  # numbers that its head gives


class GPTCritic(GPTLearner):
    """Rewards of sequences and values of states.

    Args:
        model: the GPT with the head.
        head: that of ``model``.
        scale: from what a reward model's head gives to the reward.
        reward: the reward model beside a critic; None: ``model`` gives the rewards.
        seed: of dropout.
    """

    def __init__(
        self,
        model: GPT | InterleavedGPT,
        *,
        head: HeadConfig,
        scale: RewardScale = RewardScale(),
        reward: RewardWeights | None = None,
        seed: int = 1234,
    ) -> None:
        super().__init__(model, seed=seed)
        self.head, self.scale, self._reward = head, scale, reward
        self._swapped_at = -1  # how often the weights had changed when they were last swapped

    def infer(self, batch: TokenBatch, *, micro_batch_size: int | None = None) -> Tensor:
        """[N] float (or [N, A], see :class:`RewardScale`) on every rank of the model: rewards of the sequences."""
        outputs, swapped = self.head.outputs, contextlib.nullcontext()
        if self._reward is not None:
            changed, self._swapped_at = self.changes != self._swapped_at, self.changes
            outputs = self._reward.outputs
            swapped = self._reward.weights.swapped(self.model, changed=changed)
        with swapped:
            found = self._ask(_split(batch, micro_batch_size), Wants.REWARDS)
        rewards = torch.cat([_given(output.rewards) for output in found]) if found else None
        return self.scale(collectives.broadcast_from_last_stage(rewards, (batch.lengths.numel(), outputs)))

    def values(self, batch: TokenBatch, *, micro_batch_size: int | None = None) -> Tensor:
        """[B, S] float on every rank of the model: of the state before each token of ``batch.loss_mask``, else 0."""
        found = self._ask(_split(batch, micro_batch_size), Wants.VALUES)
        values = torch.cat([_given(output.values) for output in found]) if found else None
        return collectives.broadcast_from_last_stage(values, tuple(batch.tokens.shape))

    def infer_rm_critic(
        self, batch: TokenBatch, *, micro_batch_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`~nemo_aligner.models.alignable_interface.CriticModelInterface`."""
        values = self.values(batch, micro_batch_size=micro_batch_size)
        return self.infer(batch, micro_batch_size=micro_batch_size), values


def _split(batch: TokenBatch, rows: int | None) -> list[TokenBatch]:
    return batch.split(rows) if rows else [batch]


def _given(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
