# SPDX-License-Identifier: Apache-2.0
"""Kahneman-Tversky optimization: responses that are good or bad, each by itself, against a reference."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_aligner.batch import RatedResponses, TokenBatch, Unit
from nemo_aligner.objectives.protocol import Metrics, ModelOutput, Wants


def kl_baseline(total: Tensor, count: Tensor) -> Tensor:
    """Return the baseline ``z = max(0, total / count)``, an estimate of KL(p || p_ref) in nats that has no gradient.

    Ethayarajh 2024, arXiv 2402.01306, section 4.1: the mean of ``log p(y' | x) - log p_ref(y' | x)`` over responses
    ``y'`` to other prompts than ``x``.

    total: [] float, the sum of those log-ratios; count: [] int, how many they are; 0 gives 0.

    >>> kl_baseline(torch.tensor(3.0), torch.tensor(2)), kl_baseline(torch.tensor(-3.0), torch.tensor(2))
    (tensor(1.5000), tensor(0.))
    """
    return (total / count.clamp(min=1)).clamp(min=0)


def kto(reward: Tensor, baseline: Tensor, good: Tensor, *, beta: float) -> Tensor:
    """Return ``1 - sigmoid(beta (r - z))`` of good responses, ``1 - sigmoid(beta (z - r))`` of bad ones.

    Ethayarajh 2024, arXiv 2402.01306, eq. 8, with ``r = log p - log p_ref`` and the baseline ``z``, an estimate of
    KL(p || p_ref), both in nats.

    reward, baseline: [N] float, good: [N] bool. Returns [N].

    >>> kto(torch.tensor([1.0, 1.0]), torch.zeros(2), torch.tensor([True, False]), beta=1.0)
    tensor([0.2689, 0.7311])
    """
    return 1 - torch.sigmoid(beta * (reward - baseline) * torch.where(good, 1.0, -1.0))


@dataclass(frozen=True, kw_only=True)
class KTO:
    """The mean over responses of :func:`kto`, good and bad ones by their weights."""

    ref_policy_kl_penalty: float  # beta
    desirable_loss_weight: float  # of good responses
    undesirable_loss_weight: float  # of bad ones

    wants = frozenset({Wants.LOGPROBS})
    unit = Unit.SEQUENCE
    metrics = ("loss", "kl", "rewards_chosen_mean", "rewards_rejected_mean")

    def __call__(self, output: ModelOutput, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """The summed loss; the KL that rewards are compared with, nats; good and bad responses' ``beta r``."""
        assert isinstance(batch, RatedResponses) and output.logprobs is not None
        beta, real = self.ref_policy_kl_penalty, batch.loss_lengths() > 0
        good, bad = real & batch.good, real & ~batch.good
        reward = batch.per_sequence(output.logprobs) - batch.reference_sums
        weight = self.desirable_loss_weight * good + self.undesirable_loss_weight * bad
        losses = kto(reward, batch.kl_baseline, batch.good, beta=beta)
        loss, scaled = (weight * losses).sum(), beta * reward.detach()
        return loss, {
            "loss": (loss.detach(), real.sum()),
            "kl": ((batch.kl_baseline * real).sum(), real.sum()),
            "rewards_chosen_mean": ((scaled * good).sum(), good.sum()),
            "rewards_rejected_mean": ((scaled * bad).sum(), bad.sum()),
        }
