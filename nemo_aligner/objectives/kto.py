# SPDX-License-Identifier: Apache-2.0
"""Kahneman-Tversky optimization: responses that are good or bad, each by itself, against a reference."""

from torch import Tensor


def kl_baseline(total: Tensor, count: Tensor) -> Tensor:
    """Return ``max(0, total / count)``, an estimate of KL(p || p_ref) in nats, no response of which has a gradient.

    Ethayarajh 2024, arXiv 2402.01306, section 4.1: the mean of ``log p(y' | x) - log p_ref(y' | x)`` over responses
    ``y'`` to other prompts than ``x``.

    total: [] float, the sum of those log-ratios; count: [] int, how many they are; 0 gives 0.

    >>> kl_baseline(torch.tensor(3.0), torch.tensor(2)), kl_baseline(torch.tensor(-3.0), torch.tensor(2))
    (tensor(1.5000), tensor(0.))
    """
    return (total / count.clamp(min=1)).clamp(min=0)
