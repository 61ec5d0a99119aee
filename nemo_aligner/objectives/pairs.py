# SPDX-License-Identifier: Apache-2.0
"""The common parts of losses of pairs: the margin, and the metrics of who is ahead and of the rewards of both."""

import torch
from torch import Tensor

from nemo_aligner.objectives.protocol import Metrics

PAIR_METRICS = (
    "loss",
    "acc",
    "rewards_chosen_mean",
    "rewards_rejected_mean",
    "rewards_all_mean",
    "rewards_all_square",
)


def lead(x: Tensor) -> Tensor:
    """Return [P], by how much the chosen response's number is above the rejected one's; x: [P, 2] float."""
    return x[:, 0] - x[:, 1]


def margins(policy: Tensor, reference: Tensor) -> Tensor:
    """Return [P], by how many nats the policy prefers the chosen responses more than the reference does.

    policy, reference: [P, 2] float, log-probs of the chosen and of the rejected response.
    """
    return lead(policy - reference)


def pair_loss(chosen: Tensor, rejected: Tensor, losses: Tensor, *, real: Tensor) -> tuple[Tensor, Metrics]:
    """Return the sum of the losses of real pairs, and :data:`PAIR_METRICS`.

    chosen, rejected: [P] float, rewards; losses: [P] float; real: [P] bool, False for padding rows.
    """
    loss = torch.where(real, losses, 0).sum()
    pairs = real.sum()
    right, wrong = (torch.where(real, x.detach(), 0) for x in (chosen, rejected))
    return loss, {
        "loss": (loss.detach(), pairs),
        "acc": (((chosen > rejected) & real).sum(), pairs),
        "rewards_chosen_mean": (right.sum(), pairs),
        "rewards_rejected_mean": (wrong.sum(), pairs),
        "rewards_all_mean": (right.sum() + wrong.sum(), 2 * pairs),
        "rewards_all_square": (right.square().sum() + wrong.square().sum(), 2 * pairs),
    }
