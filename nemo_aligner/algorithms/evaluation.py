# SPDX-License-Identifier: Apache-2.0
"""How often responses are right: pass@k, the majority's result, and how sure that is. Pure; knows no model."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_Z95 = 1.959964  # of a normal distribution, 95 % lie within so many standard deviations


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and half of its 95 % confidence interval; None where one prompt alone was asked.

    The interval is of the prompts' means, as the responses to one prompt are alike (Miller 2024, arXiv 2411.00640,
    section 2.2).
    """

    mean: float
    half_width: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Of one value for each prompt.

        >>> Estimate.of([0.0, 1.0, 1.0, 1.0])
        Estimate(mean=0.75, half_width=0.489991)
        """
        count = len(values)
        mean = math.fsum(values) / count
        if count == 1:
            return cls(mean, None)
        variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        return cls(mean, _Z95 * math.sqrt(variance / count))

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.half_width is None else f" ± {self.half_width:.4f}")


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the probability that one of ``k`` of the samples, drawn without replacement, is right.

    ``1 - C(n - c, k) / C(n, k)`` of n samples, c of them right: unbiased (Chen 2021, arXiv 2107.03374, eq. 1).

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def majority(results: Sequence[str], right: Sequence[bool]) -> float:
    """Return 1 if the result that most samples have is right, else 0; of several that tie, their mean.

    Self-consistency (Wang 2022, arXiv 2203.11171). A result is as right as the first sample that has it.

    >>> majority(["4", "5", "4"], [True, False, True]), majority(["4", "5"], [True, False])
    (1.0, 0.5)
    """
    votes = Counter(results)
    most = max(votes.values())
    tied = [right[results.index(result)] for result, count in votes.items() if count == most]
    return sum(tied) / len(tied)


def evaluate(
    rewards: Sequence[Sequence[float]],
    results: Sequence[Sequence[str]],
    *,
    right_from: float,
    pass_at: Sequence[int],
) -> dict[str, Estimate]:
    """Return "reward", "pass@K" of each K, and "majority@N" of N > 2 samples, over the prompts.

    Args:
        rewards: of each prompt's samples.
        results: of each prompt's samples, what they come to.
        right_from: the least reward of a right one.
        pass_at: each K.
    """
    right = [[reward >= right_from for reward in several] for several in rewards]
    samples = len(right[0])
    found = {"reward": Estimate.of([math.fsum(several) / samples for several in rewards])}
    for k in pass_at:
        found[f"pass@{k}"] = Estimate.of([pass_at_k(samples, sum(several), k) for several in right])
    if samples > 2:
        votes = [majority(*both) for both in zip(results, right, strict=True)]
        found[f"majority@{samples}"] = Estimate.of(votes)
    return found
