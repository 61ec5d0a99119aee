# SPDX-License-Identifier: Apache-2.0
"""Rewards of mathematics: ``trainer.ppo.rewards.NAME.function=nemo_aligner.environments.mathematics.right``.

Needs ``pip install 'nemo-aligner[math]'``. Some expressions take math-verify longer than any limit of its own, or all
of a machine's memory: the worker's ``timeout`` and ``memory_gb`` hold.
"""

import logging
from collections.abc import Mapping
from typing import Any

from math_verify import parse, verify

from nemo_aligner.environments.rules import BOX, boxed, of_row

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has no limits of its own
parse("$1$", parsing_timeout=0)  # its parser takes a second to begin, once for all workers


def right(*, response: str, row: Mapping[str, Any], ground_truth: str = "answer", **_: object) -> float:
    r"""Return 1 where math-verify finds results equal, else 0: ``\frac{1}{2}`` is 0.5, the last ``\boxed{}`` counts.

    Args:
        response: the text.
        row: the prompt's JSON object.
        ground_truth: its key of the right result, in LaTeX, with or without dollar signs.

    Raises:
        KeyError: the row has no such key.
    """
    wanted = of_row(row, ground_truth).strip()
    gold = parse(wanted if "$" in wanted or BOX in wanted else f"${wanted}$", parsing_timeout=0)
    if not gold:  # a text
        return float(boxed(response) == wanted)
    return float(verify(gold, parse(response, parsing_timeout=0), timeout_seconds=0))
