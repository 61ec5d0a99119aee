# SPDX-License-Identifier: Apache-2.0
"""DPO and its kin: losses of a language model on pairs of responses, most of them against a reference model."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_aligner.batch import PreferenceBatch, ReferencedPairs, TokenBatch, Unit
from nemo_aligner.objectives.config import DPOConfig
from nemo_aligner.objectives.pairs import PAIR_METRICS, lead, margins, pair_loss
from nemo_aligner.objectives.preference_variants import orpo, robust_dpo, rpo, simpo
from nemo_aligner.objectives.protocol import Metrics, ModelOutput, Wants


def dpo(policy: Tensor, reference: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Return ``-log sigmoid(beta margin)`` of each pair (Rafailov 2023, arXiv 2305.18290, eq. 7).

    ``margin = (log p - log p_ref)(chosen) - (log p - log p_ref)(rejected)``, of policy and reference [P, 2] float:
    log-probs of the chosen and of the rejected response of each pair. Returns [P].

    With label smoothing ``e``: ``-(1 - e) log sigmoid(beta margin) - e log sigmoid(-beta margin)``, for labels that are
    wrong with probability e (conservative DPO, Mitchell 2023).

    >>> import torch
    >>> dpo(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -2.0]]), beta=2.0, label_smoothing=0.1)
    tensor([0.3269])
    """
    margin = lead(beta * (policy - reference))
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def ipo(policy: Tensor, reference: Tensor, *, beta: float) -> Tensor:
    """Return ``(margin - 1 / (2 beta))^2`` of each pair (Azar 2023, arXiv 2310.12036, eq. 17); shapes as of `dpo`.

    >>> import torch
    >>> ipo(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -2.0]]), beta=0.5)
    tensor([0.])
    """
    return (margins(policy, reference) - 1 / (2 * beta)).square()


@dataclass(frozen=True)
class DPO:
    """The mean over pairs of the loss that ``config.preference_loss`` names.

    ``config.sft_loss_weight`` times the chosen responses' negative log-likelihood is added.
    """

    config: DPOConfig = field(default_factory=DPOConfig)

    wants = frozenset({Wants.LOGPROBS})
    unit = Unit.PAIR
    metrics = (*PAIR_METRICS, "preference_loss", "sft_loss")

    def __call__(self, output: ModelOutput, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """The summed loss; its two parts, accuracy and implicit rewards, ``beta (log p - log p_ref)``."""
        assert isinstance(batch, PreferenceBatch) and output.logprobs is not None
        config, real = self.config, batch.real_pairs()
        sums, lengths = batch.per_sequence(output.logprobs), batch.loss_lengths().clamp(min=1)
        # SimPO and ORPO take mean log-probs, as their papers define them.
        by_mean = config.preference_average_log_probs or not config.has_reference
        reference_sums = torch.zeros_like(sums)
        if config.has_reference:
            assert isinstance(batch, ReferencedPairs), type(batch)
            reference_sums = batch.reference_sums
        policy, reference = ((x / (lengths if by_mean else 1)).view(-1, 2) for x in (sums, reference_sums))
        losses = _losses(policy, reference, batch.given_rewards.view(-1, 2), config)
        nll = -(sums / (lengths if config.averages_sft else 1))[::2]
        total = config.preference_loss_weight * losses + config.sft_loss_weight * nll
        chosen, rejected = (config.ref_policy_kl_penalty * (policy - reference)).unbind(1)
        loss, metrics = pair_loss(chosen, rejected, total, real=real)
        for name, part in (("preference_loss", losses), ("sft_loss", nll)):
            metrics[name] = torch.where(real, part.detach(), 0).sum(), real.sum()
        return loss, metrics


def _losses(policy: Tensor, reference: Tensor, rewards: Tensor, config: DPOConfig) -> Tensor:
    """Return [P], the loss of each pair that ``config`` names."""
    beta, smoothing = config.ref_policy_kl_penalty, config.label_smoothing
    match config.preference_loss:
        case "dpo":
            return dpo(policy, reference, beta=beta, label_smoothing=smoothing)
        case "ipo":
            return ipo(policy, reference, beta=beta)
        case "robust":
            return robust_dpo(policy, reference, beta=beta, label_smoothing=smoothing)
        case "simpo":
            return simpo(policy, beta=beta, gamma=config.simpo_gamma)
        case "orpo":
            return orpo(policy)
        case "rpo_sq" | "rpo_bwd_kl" | "rpo_fwd_kl" as distance:
            scale = config.gt_reward_scale
            return rpo(policy, reference, rewards, beta=beta, scale=scale, distance=distance)
