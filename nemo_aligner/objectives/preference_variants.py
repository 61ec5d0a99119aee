# SPDX-License-Identifier: Apache-2.0
"""Preference losses besides DPO and IPO: for wrong labels, for given rewards, and without a reference (SimPO, ORPO).

Shapes: P pairs.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_aligner.objectives.pairs import lead, margins

Distance = Literal["rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl"]


def robust_dpo(policy: Tensor, reference: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """Return DPO's loss corrected for labels that are wrong with probability ``e``.

    Its mean over such labels is the loss of the right ones: ``(-(1 - e) log sigmoid(beta margin) + e log sigmoid(-beta
    margin)) / (1 - 2 e)`` (Chowdhury 2024, arXiv 2403.00409). Shapes as of :func:`margins`.

    >>> import torch
    >>> same = torch.tensor([[-1.0, -2.0]])
    >>> robust_dpo(same, same, beta=0.5, label_smoothing=0.2)
    tensor([0.6931])
    """
    margin = beta * margins(policy, reference)
    right, wrong = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def bernoulli_kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(Bernoulli(sigmoid p) || Bernoulli(sigmoid q)) of logits, nats."""
    first = p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q))
    return first + (-p).sigmoid() * (F.logsigmoid(-p) - F.logsigmoid(-q))


def rpo(
    policy: Tensor, reference: Tensor, rewards: Tensor, *, beta: float, scale: float, distance: Distance
) -> Tensor:
    """Return the distance of the policy's margin from the rewards' (NVIDIA 2024, arXiv 2406.11704, section 3.3.2).

    With ``a = beta margin`` and ``b = scale (r_chosen - r_rejected)``: "rpo_sq" is ``(a - b)^2``, "rpo_bwd_kl"
    ``KL(sigmoid b || sigmoid a)``, "rpo_fwd_kl" ``KL(sigmoid a || sigmoid b)``.

    rewards: [P, 2] float; other shapes as of :func:`margins`.

    >>> import torch
    >>> same = torch.tensor([[-1.0, -2.0]])
    >>> rpo(same, same, torch.tensor([[3.0, 1.0]]), beta=1.0, scale=0.5, distance="rpo_sq")
    tensor([1.])
    """
    implicit, given = beta * margins(policy, reference), scale * lead(rewards)
    match distance:
        case "rpo_bwd_kl":
            return bernoulli_kl(given, implicit)
        case "rpo_fwd_kl":
            return bernoulli_kl(implicit, given)
        case "rpo_sq":
            return (implicit - given).square()


def simpo(policy: Tensor, *, beta: float, gamma: float) -> Tensor:
    """Return ``-log sigmoid(beta (chosen - rejected) - gamma)`` (Meng 2024, arXiv 2405.14734, eq. 6).

    policy: [P, 2] float, mean log-probs of the responses' tokens.

    >>> import torch
    >>> simpo(torch.tensor([[-1.0, -1.5]]), beta=2.0, gamma=1.0)
    tensor([0.6931])
    """
    return -F.logsigmoid(beta * lead(policy) - gamma)


def orpo(policy: Tensor) -> Tensor:
    """Return ``-log sigmoid(log odds(chosen) - log odds(rejected))``, with ``odds = p / (1 - p)``.

    Hong 2024, arXiv 2403.07691, eq. 7. policy: [P, 2] float, mean log-probs of the responses' tokens.

    >>> import torch
    >>> orpo(torch.tensor([[0.5, 0.25]]).log())
    tensor([0.2877])
    """
    # 1 - p is 0 for a response of probability 1, and in padding rows; its log and its gradient must stay finite.
    complement = (-torch.expm1(policy)).clamp(min=torch.finfo(policy.dtype).tiny)
    log_odds = policy - torch.log(complement)
    return -F.logsigmoid(lead(log_odds))
