# SPDX-License-Identifier: Apache-2.0
"""Kahneman-Tversky optimization: responses that are good or bad, each by itself, against a reference."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_aligner.batch import RatedResponses, TokenBatch, Unit
from nemo_aligner.objectives.protocol import Metrics, ModelOutput, Wants


def kto(reward: Tensor, baseline: Tensor, good: Tensor, *, beta: float) -> Tensor:
    """Return ``1 - sigmoid(beta (r - z))`` of good responses, ``1 - sigmoid(beta (z - r))`` of bad ones.

    Ethayarajh 2024, arXiv 2402.01306, eq. 8, with ``r = log p - log p_ref`` and the baseline ``z``, an estimate of
    KL(p || p_ref), both in nats.

    reward, baseline: [N] float, good: [N] bool. Returns [N].

    >>> kto(torch.tensor([1.0, 1.0]), torch.zeros(2), torch.tensor([True, False]), beta=1.0)
    tensor([0.2689, 0.7311])
    """
    return torch.sigmoid(beta * (baseline - reward) * torch.where(good, 1.0, -1.0))


@dataclass(frozen=True, kw_only=True)
class KTO:
    """The mean over responses of :func:`kto`, times ``good_weight`` or ``bad_weight``, the paper's lambdas."""

    beta: float = 0.2
    good_weight: float = 1.0
    bad_weight: float = 1.0

    wants = frozenset({Wants.LOGPROBS})
    unit = Unit.SEQUENCE
    metrics = ("loss", "kl", "rewards_chosen_mean", "rewards_rejected_mean")

    def __call__(self, output: ModelOutput, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """The summed loss; the KL that rewards are compared with, nats; good and bad responses' ``beta r``."""
        assert isinstance(batch, RatedResponses) and output.logprobs is not None
        beta, real = self.beta, batch.loss_lengths() > 0
        good, bad = real & batch.good, real & ~batch.good
        reward = batch.per_sequence(output.logprobs) - batch.reference_sums
        weight = self.good_weight * good + self.bad_weight * bad
        losses = kto(reward, batch.kl_baseline, batch.good, beta=beta)
        loss, scaled = (weight * losses).sum(), beta * reward.detach()
        return loss, {
            "loss": (loss.detach(), real.sum()),
            "kl": ((batch.kl_baseline * real).sum(), real.sum()),
            "rewards_chosen_mean": ((scaled * good).sum(), good.sum()),
            "rewards_rejected_mean": ((scaled * bad).sum(), bad.sum()),
        }
