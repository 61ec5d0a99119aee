# SPDX-License-Identifier: Apache-2.0
"""Rewards of responses by Python functions, and the weighted sum of several rewards. Knows no server and no critic.

Shapes: N responses of all ranks.
"""

import importlib
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from nemo_aligner.algorithms.ppo_config import RewardConfig
from nemo_aligner.algorithms.skips import NotFinite
from nemo_aligner.data.row import Row
from nemo_aligner.errors import UserError
from nemo_aligner.parallel import collectives, world
from nemo_aligner.rollout_batch import Rollout

RewardFunction = Callable[..., float]
"""``function(prompt=str, response=str, tokens=list[int], row=dict) -> float``; ``row`` is the prompt's JSON object."""


@dataclass(frozen=True)
class _Failed:
    """A function's failure, reported to every rank."""

    problem: str


def load_function(setting: str, path: str) -> RewardFunction:
    """Import ``MODULE.NAME``, also from the folder that the script was started in.

    Args:
        setting: the key that names it, for messages.

    Raises:
        UserError: there is no such module, or no such function in it.
    """
    module, _, name = path.rpartition(".")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    fix = f"set {setting}=MODULE.NAME, of a module in {here} or one that is installed"
    if not module:
        raise UserError(f"{setting}={path} names no module", fix=fix)
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UserError(f"{setting}={path} cannot be imported: {error}", fix=fix) from error
    if not callable(found):
        raise UserError(f"{setting}={path} is no function", fix=fix)
    return cast(RewardFunction, found)


def score_by_functions(
    functions: Mapping[str, RewardFunction],
    rollout: Rollout,
    prompts: Mapping[int, Row],
    *,
    text: Callable[[Rollout, int], str],
    block: str = "trainer.ppo.rewards.",
) -> dict[str, Tensor]:
    """Return each function's [N] float32 rewards, on every rank. Called by all ranks.

    Args:
        functions: by the reward's name.
        rollout: the whole one.
        prompts: those of this data parallel rank, by number; it scores the responses to them.
        text: of the response in a row.
        block: what stands before a name in messages.

    Raises:
        NotFinite: a function failed, or its reward is no finite number.
    """
    with world.phase("scoring by functions"), world.at_own_pace():
        mine = (
            _score(functions, rollout, prompts, text)
            if world.tp_rank() == 0 and world.is_first_stage()
            else {}
        )
        parts = collectives.of_all_ranks(mine)
    for part in parts:
        if isinstance(part, _Failed):
            raise NotFinite(UserError(f"{block}{part.problem}", fix="correct the function"))
    known = {row: rewards for part in parts if isinstance(part, dict) for row, rewards in part.items()}
    table = torch.tensor([known[row] for row in range(rollout.num_rows)], dtype=torch.float32)
    return dict(zip(functions, table.unbind(1), strict=True))


def _score(
    functions: Mapping[str, RewardFunction],
    rollout: Rollout,
    prompts: Mapping[int, Row],
    text: Callable[[Rollout, int], str],
) -> dict[int, list[float]] | _Failed:
    found: dict[int, list[float]] = {}
    for row, number in enumerate(map(int, rollout.group)):
        if number not in prompts:
            continue
        prompt, tokens = prompts[number], rollout.response(row)
        given = {"prompt": prompt.text, "response": text(rollout, row), "tokens": tokens}
        found[row] = []
        for name, function in functions.items():
            try:
                reward = float(function(**given, row=dict(prompt.extras)))
            except Exception as error:  # a person's code, whose failure every rank must hear of
                theirs = traceback.extract_tb(error.__traceback__)[1:]
                place = f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""
                return _Failed(f"{name}: {type(error).__name__}: {error}{place}; the row: {prompt.extras}")
            if not math.isfinite(reward):
                return _Failed(f"{name} gave {reward}; the row: {prompt.extras}")
            found[row].append(reward)
    return found


def weighted_sum(rewards: Mapping[str, Tensor], configs: Mapping[str, RewardConfig]) -> Tensor:
    """Return the sum of [N] ``rewards`` by their weights; one without a config counts once.

    >>> two = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([4.0, 0.0])}
    >>> weighted_sum(two, {"b": RewardConfig(weight=0.5)})
    tensor([3., 2.])
    """
    weighted: Sequence[Tensor] = [
        reward if (weight := configs[name].weight if name in configs else 1.0) == 1 else weight * reward
        for name, reward in rewards.items()
    ]
    first, *others = weighted
    return sum(others, first)
