# SPDX-License-Identifier: Apache-2.0
"""Numbers that a run adapts from one rollout to the next: the KL penalty's coefficient and the rewards' scale.

Each is a frozen value; an update makes the next one. What of it must outlive a restart is a dict of floats.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, Self

from nemo_aligner.objectives.reduce import Moments

_MAX_ERROR = 0.2


class KLController(Protocol):
    """Where the KL penalty's coefficient comes from."""

    @property
    def coefficient(self) -> float:
        """The cost of a nat."""
        ...

    def update(self, kl: float, num_responses: int) -> Self:
        """The controller after a rollout.

        Args:
            kl: mean over the responses of all ranks of KL(policy || initial policy), nats in a whole response.
            num_responses: how many they were.
        """
        ...

    def state_dict(self) -> dict[str, float]:
        """The state that a checkpoint keeps."""
        ...

    def restored(self, state: Mapping[str, float]) -> Self:
        """This controller where the one that gave ``state`` was; settings that are not state stay."""
        ...


@dataclass(frozen=True, kw_only=True)
class FixedKL:
    """One coefficient for the whole run."""

    coefficient: float

    def update(self, kl: float, num_responses: int) -> Self:  # noqa: ARG002
        """Itself."""
        return self

    def state_dict(self) -> dict[str, float]:
        """Nothing: the setting says it all."""
        return {}

    def restored(self, state: Mapping[str, float]) -> Self:  # noqa: ARG002
        """Itself."""
        return self


@dataclass(frozen=True, kw_only=True)
class AdaptiveKL:
    """A coefficient that is raised while the KL is above its target and lowered while it is below.

    Ziegler 2019 (arXiv 1909.08593, section 2.2): ``e = clip((KL - target) / target, -0.2, 0.2)``,
    ``coefficient *= 1 + K e``, with ``K = num_responses / horizon`` as in the authors' code.
    """

    coefficient: float
    target: float  # nats in a whole response
    horizon: float  # responses

    def update(self, kl: float, num_responses: int) -> Self:
        """The controller after ``num_responses`` responses of mean KL ``kl``, nats in a whole response.

        >>> AdaptiveKL(coefficient=0.1, target=6.0, horizon=10000).update(12.0, 500).coefficient
        0.101
        """
        assert math.isfinite(kl), kl
        error = min(max(kl / self.target - 1, -_MAX_ERROR), _MAX_ERROR)
        # Of more responses than the horizon has, K would exceed 1, and a coefficient might turn negative.
        return replace(
            self, coefficient=self.coefficient * (1 + error * min(num_responses / self.horizon, 1))
        )

    def state_dict(self) -> dict[str, float]:
        """The coefficient."""
        return {"coefficient": self.coefficient}

    def restored(self, state: Mapping[str, float]) -> Self:
        """This controller with the coefficient of ``state``; its own one where a fixed controller wrote it."""
        return replace(self, coefficient=state.get("coefficient", self.coefficient))


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
