# SPDX-License-Identifier: Apache-2.0
"""The one place where sums and counts become means, and mean squares become standard deviations."""

import math

from nemo_aligner.objectives.protocol import Sums


def added(*parts: Sums) -> Sums:
    """Return the sums of all parts together.

    >>> added({"loss": (1.0, 2.0)}, {"loss": (2.0, 1.0), "acc": (1.0, 1.0)})
    {'loss': (3.0, 3.0), 'acc': (1.0, 1.0)}
    """
    found: Sums = {}
    for name, (value, count) in (item for part in parts for item in part.items()):
        before = found.get(name, (0.0, 0.0))
        found[name] = before[0] + value, before[1] + count
    return found


def means(sums: Sums) -> dict[str, float]:
    """Return each metric's mean, 0 of nothing; a ``*_square`` becomes ``*_std``, beside its ``*_mean``.

    >>> means({"loss": (6.0, 4.0), "rewards_mean": (6.0, 2.0), "rewards_square": (50.0, 2.0)})
    {'loss': 1.5, 'rewards_mean': 3.0, 'rewards_std': 4.0}
    """
    plain = {name: value / max(count, 1) for name, (value, count) in sums.items()}
    found: dict[str, float] = {}
    for name, mean in plain.items():
        stem = name.removesuffix("_square")
        if stem == name:
            found[name] = mean
        else:
            found[f"{stem}_std"] = math.sqrt(max(mean - plain[f"{stem}_mean"] ** 2, 0.0))
    return found
