# SPDX-License-Identifier: Apache-2.0
"""Reductions over masked tokens: means, moments, whitening and estimates of the KL divergence."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# As verl and OpenRLHF hold them: e^20 is beyond every clip, and squares of it are far from the end of float32.
MAX_LOG_RATIO = 20.0  # nats
MAX_K3 = 10.0  # nats

KLEstimator = Literal["k1", "abs", "k2", "k3"]


def masked_mean(x: Tensor, mask: Tensor, *, dim: int | None = None) -> Tensor:
    """The mean of ``x`` where ``mask`` is set, 0 where it is set nowhere.

    x: float, mask: bool, of one shape; ``dim`` as torch.mean has it.

    >>> masked_mean(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]), dim=1)
    tensor([2.])
    """
    kept = torch.where(mask, x, 0)
    return kept.sum(dim) / mask.sum(dim).clamp(min=1)


def kl_baseline(total: Tensor, count: Tensor) -> Tensor:
    """Return the baseline ``z = max(0, total / count)``, an estimate of KL(p || p_ref) in nats that has no gradient.

    Ethayarajh 2024, arXiv 2402.01306, section 4.1: the mean of :func:`log_ratios` over responses to other prompts.

    total: [] float, the sum of those log-ratios; count: [] int, how many they are; 0 gives 0.

    >>> kl_baseline(torch.tensor(3.0), torch.tensor(2)), kl_baseline(torch.tensor(-3.0), torch.tensor(2))
    (tensor(1.5000), tensor(0.))
    """
    return (total / count.clamp(min=1)).clamp(min=0)


def log_ratios(policy: Tensor, reference: Tensor, real: Tensor) -> Tensor:
    """Return [2] float: the sum of ``log p - log p_ref`` over real sequences, and how many they are; all [N].

    >>> log_ratios(torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, 9.0]), torch.tensor([True, False]))
    tensor([2., 1.])
    """
    return torch.stack((torch.where(real, policy - reference, 0).sum(), real.sum()))


@dataclass(frozen=True, slots=True)
class Moments:
    """Sum, sum of squares and count of numbers, from which mean and variance follow.

    >>> found = Moments.of(torch.tensor([1.0, 2.0, 3.0, 9.0]), torch.tensor([True, True, True, False]))
    >>> found.count.item(), found.mean.item()
    (3.0, 2.0)
    """

    sums: Tensor  # [3] float64: sum, sum of squares, count

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None = None) -> "Moments":
        """The moments of ``x`` where ``mask`` is set; of all of it where there is no mask."""
        # float64: E[x^2] - E[x]^2 of float32 sums loses a small variance beside a large mean.
        chosen = (x if mask is None else x[mask]).double()
        return cls(torch.stack([chosen.sum(), chosen.square().sum(), chosen.new_tensor(chosen.numel())]))

    @property
    def count(self) -> Tensor:
        """[] float64: how many numbers."""
        return self.sums[2]

    @property
    def mean(self) -> Tensor:
        """[] float64; 0 of nothing."""
        return self.sums[0] / self.count.clamp(min=1)

    @property
    def variance(self) -> Tensor:
        """[] float64, biased (divided by the count); 0 of nothing."""
        return (self.sums[1] / self.count.clamp(min=1) - self.mean.square()).clamp(min=0)

    @property
    def std(self) -> Tensor:
        """[] float64, the root of :attr:`variance`."""
        return self.variance.sqrt()


def whiten(x: Tensor, mask: Tensor, moments: Moments, *, eps: float = 1e-8) -> Tensor:
    """``(x - mean) / sqrt(variance + eps)`` where ``mask`` is set, else 0.

    x: [B, S] float, mask: [B, S] bool, moments: of all that is whitened together, usually over all ranks.
    Returns [B, S] of the dtype of ``x``.
    """
    white = (x.double() - moments.mean) * torch.rsqrt(moments.variance + eps)
    return torch.where(mask, white, 0).to(x.dtype)


def likelihood_ratio(log_ratio: Tensor) -> Tensor:
    """``p / q`` from ``log p - log q``, which is held within +-20: finite for all finite log-probs.

    Beyond the bound the gradient is 0. A float tensor; returns one of its shape.

    >>> likelihood_ratio(torch.tensor([0.0, 95.0]))
    tensor([1.0000e+00, 4.8517e+08])
    """
    return torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def kl_k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """``log p - log q`` of tokens that p drew: unbiased for KL(p || q), of either sign.

    Two tensors of one shape, float; returns the same. The names k1, k2 and k3 are those of Schulman,
    http://joschu.net/blog/kl-approx.html.
    """
    return logprobs - reference


def kl_abs(logprobs: Tensor, reference: Tensor) -> Tensor:
    """``|log p - log q|``: never negative, and 0 where both agree; an upper bound of k1 and not a divergence."""
    return kl_k1(logprobs, reference).abs()


def kl_k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """``(log p - log q)^2 / 2``: never negative, biased, of low variance where p and q are close."""
    return 0.5 * kl_k1(logprobs, reference).square()


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """``q / p - 1 - log(q / p)``: never negative, and unbiased for KL(p || q) but for its bound of 10 nats a token.

    >>> kl_k3(torch.tensor(0.0), torch.tensor(0.5))  # e^0.5 - 1 - 0.5
    tensor(0.1487)
    """
    towards = (reference - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    # expm1: for close policies e^x - 1 - x is a difference of nearly equal numbers.
    return (torch.expm1(towards) - towards).clamp(max=MAX_K3)


def estimate_kl(logprobs: Tensor, reference: Tensor, estimator: KLEstimator) -> Tensor:
    """Return each token's estimate of KL(p || q), nats, by the estimator of that name: two tensors of one shape, float.

    >>> estimate_kl(torch.tensor([-1.0]), torch.tensor([-2.0]), "k2")
    tensor([0.5000])
    """
    match estimator:
        case "k1":
            return kl_k1(logprobs, reference)
        case "abs":
            return kl_abs(logprobs, reference)
        case "k2":
            return kl_k2(logprobs, reference)
        case "k3":
            return kl_k3(logprobs, reference)
