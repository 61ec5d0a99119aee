# SPDX-License-Identifier: Apache-2.0
"""Losses of pairs of responses by a language model itself, against a reference: no reward model between."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_aligner.batch import PreferenceBatch, ReferencedPairs, TokenBatch, Unit
from nemo_aligner.objectives.config import DPOConfig
from nemo_aligner.objectives.pairs import PAIR_METRICS, pair_loss
from nemo_aligner.objectives.protocol import Metrics, ModelOutput, Wants


def margins(policy: Tensor, reference: Tensor) -> Tensor:
    """Return [P], by how many nats the policy prefers the chosen responses more than the reference does.

    policy, reference: [P, 2] float, log-probs of the chosen and of the rejected response.
    """
    return (policy - reference).diff(dim=1)[:, 0].neg()


def dpo(policy: Tensor, reference: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Return ``-log sigmoid(beta margin)`` of each pair (Rafailov 2023, arXiv 2305.18290, eq. 7).

    With label smoothing ``e``: ``-(1 - e) log sigmoid(beta margin) - e log sigmoid(-beta margin)``, for labels that are
    wrong with probability e (conservative DPO, Mitchell 2023). Shapes as of :func:`margins`.

    >>> import torch
    >>> dpo(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -2.0]]), beta=2.0, label_smoothing=0.1)
    tensor([0.3269])
    """
    reward = beta * margins(policy, reference)
    return -(1 - label_smoothing) * F.logsigmoid(reward) - label_smoothing * F.logsigmoid(-reward)


def ipo(policy: Tensor, reference: Tensor, *, beta: float) -> Tensor:
    """Return ``(margin - 1 / (2 beta))^2`` of each pair (Azar 2023, arXiv 2310.12036, eq. 17), shapes as of `margins`.

    >>> import torch
    >>> ipo(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -2.0]]), beta=0.5)
    tensor([0.])
    """
    return (margins(policy, reference) - 1 / (2 * beta)).square()


def robust_dpo(policy: Tensor, reference: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """Return the unbiased estimate of the loss of clean labels, of labels that are wrong with probability e.

    ``(-(1 - e) log sigmoid(beta margin) + e log sigmoid(-beta margin)) / (1 - 2 e)`` (Chowdhury 2024, arXiv
    2403.00409). Shapes as of :func:`margins`.
    """
    reward = beta * margins(policy, reference)
    clean, flipped = (1 - label_smoothing) * F.logsigmoid(reward), label_smoothing * F.logsigmoid(-reward)
    return (flipped - clean) / (1 - 2 * label_smoothing)


def bernoulli_kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(Bernoulli(sigmoid p) || Bernoulli(sigmoid q)) of logits, nats."""
    right = p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q))
    return right + (-p).sigmoid() * (F.logsigmoid(-p) - F.logsigmoid(-q))


def rpo(
    policy: Tensor, reference: Tensor, rewards: Tensor, *, beta: float, scale: float, distance: str
) -> Tensor:
    """Return how far the implicit margin is from the given one (NVIDIA 2024, arXiv 2406.11704, RPO).

    With ``a = beta margin`` and ``b = scale (r_chosen - r_rejected)``: "rpo_sq" is ``(a - b)^2``, "rpo_bwd_kl"
    ``KL(sigmoid b || sigmoid a)``, "rpo_fwd_kl" ``KL(sigmoid a || sigmoid b)``.

    rewards: [P, 2] float; other shapes as of :func:`margins`.

    >>> import torch
    >>> same = torch.tensor([[-1.0, -2.0]])
    >>> rpo(same, same, torch.tensor([[3.0, 1.0]]), beta=1.0, scale=0.5, distance="rpo_sq")
    tensor([1.])
    """
    implicit, given = beta * margins(policy, reference), scale * -rewards.diff(dim=1)[:, 0]
    match distance:
        case "rpo_bwd_kl":
            return bernoulli_kl(given, implicit)
        case "rpo_fwd_kl":
            return bernoulli_kl(implicit, given)
        case _:
            return (implicit - given).square()


def simpo(policy: Tensor, *, beta: float, gamma: float) -> Tensor:
    """Return ``-log sigmoid(beta (chosen - rejected) - gamma)`` (Meng 2024, arXiv 2405.14734, eq. 6).

    policy: [P, 2] float, mean log-probs of the responses' tokens.

    >>> import torch
    >>> simpo(torch.tensor([[-1.0, -1.5]]), beta=2.0, gamma=1.0)
    tensor([0.6931])
    """
    return -F.logsigmoid(beta * -policy.diff(dim=1)[:, 0] - gamma)


def orpo(policy: Tensor) -> Tensor:
    """Return ``-log sigmoid(log odds(chosen) - log odds(rejected))``, with ``odds = p / (1 - p)``.

    Hong 2024, arXiv 2403.07691, eq. 7. policy: [P, 2] float, mean log-probs of the responses' tokens.

    >>> import torch
    >>> orpo(torch.tensor([[0.5, 0.25]]).log())
    tensor([0.2877])
    """
    # Of padding rows log-probs are 0, and so may be those of a response that is certain.
    others = (-torch.expm1(policy)).clamp(min=torch.finfo(policy.dtype).tiny)
    log_odds = policy - torch.log(others)
    return -F.logsigmoid(-log_odds.diff(dim=1)[:, 0])


@dataclass(frozen=True)
class DPO:
    """The mean over pairs of one of the losses above, plus the chosen responses' negative log-likelihood."""

    config: DPOConfig = field(default_factory=DPOConfig)

    wants = frozenset({Wants.LOGPROBS})
    unit = Unit.PAIR
    metrics = (*PAIR_METRICS, "preference_loss", "sft_loss")

    def __call__(self, output: ModelOutput, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """The summed loss; its two parts, accuracy and implicit rewards, ``beta (log p - log p_ref)``."""
        assert isinstance(batch, PreferenceBatch) and output.logprobs is not None
        config, real = self.config, batch.real_pairs()
        sums, lengths = batch.per_sequence(output.logprobs), batch.loss_lengths().clamp(min=1)
        by_mean = config.preference_average_log_probs or not config.has_reference
        reference = batch.reference_sums if isinstance(batch, ReferencedPairs) else torch.zeros_like(sums)
        policy, reference = ((x / (lengths if by_mean else 1)).view(-1, 2) for x in (sums, reference))
        losses = _losses(policy, reference, batch.given_rewards, config)
        nll = -(sums / (lengths if config.sft_average_log_probs else 1))[::2]
        total = config.preference_loss_weight * losses + config.sft_loss_weight * nll
        chosen, rejected = (config.ref_policy_kl_penalty * (policy - reference)).unbind(1)
        loss, metrics = pair_loss(chosen, rejected, total, real=real)
        parts = {"preference_loss": losses, "sft_loss": nll}
        return loss, metrics | {name: ((x.detach() * real).sum(), real.sum()) for name, x in parts.items()}


def _losses(policy: Tensor, reference: Tensor, rewards: Tensor | None, config: DPOConfig) -> Tensor:
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
        case distance:
            assert rewards is not None, "see PairJob.default_rewards"
            scale = config.gt_reward_scale
            return rpo(policy, reference, rewards.view(-1, 2), beta=beta, scale=scale, distance=distance)
