# SPDX-License-Identifier: Apache-2.0
"""Numbers that a run adapts from one rollout to the next: the KL penalty's coefficient and the rewards' scale.

Each is a frozen value; an update makes the next one. What of it must outlive a restart is a dict of floats.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from nemo_aligner.objectives.reduce import Moments

_MAX_ERROR = 0.2


@dataclass(frozen=True, kw_only=True)
class KLController:
    """The KL penalty's coefficient; with a target it is raised while the KL is above, and lowered while it is below.

    Ziegler 2019 (arXiv 1909.08593, section 2.2): ``e = clip((KL - target) / target, -0.2, 0.2)``,
    ``coefficient *= 1 + K e``, with ``K = num_responses / horizon`` as in the authors' code.
    """

    coefficient: float  # the cost of a nat
    target: float | None = None  # nats in a whole response; None: one coefficient for the whole run
    horizon: float = 1.0  # responses

    def update(self, kl: float, num_responses: int) -> Self:
        """The controller after a rollout.

        Args:
            kl: mean over the responses of all ranks of KL(policy || initial policy), nats in a whole response.
            num_responses: how many they were.

        >>> KLController(coefficient=0.1, target=6.0, horizon=10000).update(12.0, 500).coefficient
        0.101
        """
        if self.target is None:
            return self
        assert math.isfinite(kl), kl
        error = min(max(kl / self.target - 1, -_MAX_ERROR), _MAX_ERROR)
        # Of more responses than the horizon has, K would exceed 1, and a coefficient might turn negative.
        return replace(
            self, coefficient=self.coefficient * (1 + error * min(num_responses / self.horizon, 1))
        )

    def state_dict(self) -> dict[str, float]:
        """The state that a checkpoint keeps: nothing of a fixed coefficient, which the setting says."""
        return {} if self.target is None else {"coefficient": self.coefficient}

    def restored(self, state: Mapping[str, float]) -> Self:
        """This controller with the coefficient of ``state``; settings, a fixed coefficient among them, stay."""
        return self if self.target is None else replace(self, **state)


@dataclass(frozen=True, kw_only=True)
class RewardScaling:
    """The divisor of rewards: the spread of all discounted rolling sums of rewards seen so far.

    Engstrom 2020 (arXiv 2005.12729, algorithm 1); the mean is not subtracted.
    """

    total: float = 0.0
    total_of_squares: float = 0.0
    count: float = 0.0

    def update(self, rolling: Moments) -> Self:
        """The scaling after another rollout; ``rolling``: of all ranks' ``credit.rolling_returns``."""
        total, squares, count = (float(value) for value in rolling.sums)
        return replace(
            self,
            total=self.total + total,
            total_of_squares=self.total_of_squares + squares,
            count=self.count + count,
        )

    @property
    def divisor(self) -> float:
        """The standard deviation (biased); 1 while nothing has been seen to vary.

        >>> import torch
        >>> RewardScaling().update(Moments.of(torch.tensor([1.0, 5.0]))).divisor
        2.0
        """
        if not self.count:
            return 1.0
        mean = self.total / self.count
        variance = self.total_of_squares / self.count - mean * mean
        # What is left of a constant after rounding is no spread.
        return math.sqrt(variance) if variance > 1e-12 * mean * mean else 1.0

    def state_dict(self) -> dict[str, float]:
        """The three sums."""
        return {"total": self.total, "total_of_squares": self.total_of_squares, "count": self.count}

    def restored(self, state: Mapping[str, float]) -> Self:
        """The scaling that gave ``state``; this one where ``state`` is empty."""
        return replace(self, **state)
