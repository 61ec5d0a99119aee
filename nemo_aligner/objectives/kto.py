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
    return 1 - torch.sigmoid(beta * (reward - baseline) * torch.where(good, 1.0, -1.0))


@dataclass(frozen=True, kw_only=True)
class KTO:
    """The mean over responses of :func:`kto`, good and bad ones by their weights."""

    ref_policy_kl_penalty: float = 0.2  # beta
    desirable_loss_weight: float = 1.0
    undesirable_loss_weight: float = 1.0

    wants = frozenset({Wants.LOGPROBS})
    unit = Unit.SEQUENCE
    metrics = ("loss", "kl", "rewards_chosen_mean", "rewards_rejected_mean")

    def __call__(self, output: ModelOutput, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """The summed loss; the KL that rewards are compared with, nats; good and bad responses' ``beta r``."""
        assert isinstance(batch, RatedResponses) and output.logprobs is not None
        real, good = batch.loss_lengths() > 0, batch.given_rewards > 0
        reward = batch.per_sequence(output.logprobs) - batch.reference_sums
        weight = torch.where(good, self.desirable_loss_weight, self.undesirable_loss_weight) * real
        losses = weight * kto(reward, batch.kl_baseline, good, beta=self.ref_policy_kl_penalty)
        loss, scaled = losses.sum(), self.ref_policy_kl_penalty * reward.detach()
        return loss, {
            "loss": (loss.detach(), batch.count(self.unit)),
            "kl": ((batch.kl_baseline * real).sum(), real.sum()),
            "rewards_chosen_mean": ((scaled * (real & good)).sum(), (real & good).sum()),
            "rewards_rejected_mean": ((scaled * (real & ~good)).sum(), (real & ~good).sum()),
        }
