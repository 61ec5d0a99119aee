# SPDX-License-Identifier: Apache-2.0
"""Rewards of responses by Python functions, and the weighted sum of several rewards. Knows no server and no critic.

A function is called as ``function(prompt=str, response=str, tokens=list[int], row=dict) -> float``, in a process of its
own; ``row`` is the prompt's JSON object. Shapes: N responses of all ranks.
"""

import logging
import math
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_aligner.algorithms.ppo_config import RewardConfig
from nemo_aligner.algorithms.skips import NotFinite
from nemo_aligner.data.row import Row
from nemo_aligner.environments.workers import Reply, WorkerPool
from nemo_aligner.errors import UserError
from nemo_aligner.objectives.reduce import Moments, whiten
from nemo_aligner.parallel import collectives, world
from nemo_aligner.rollout_batch import Rollout

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RewardFunction:
    """A person's function."""

    pool: WorkerPool | None  # on the ranks that call it
    arguments: Mapping[str, Any]  # besides the response's
    lost_reward: float = 0.0  # of a response whose call is out of time, or whose process crashes


@contextmanager
def open_functions(
    named: Mapping[str, RewardConfig], *, setting: str
) -> Generator[dict[str, RewardFunction]]:
    """Within it, the functions of the rewards can be called. Called by all ranks.

    Args:
        named: rewards with a function, by name.
        setting: that names a function, with {} for the reward's name.

    Raises:
        UserError: there is no such function; on every rank.
    """
    with ExitStack() as stack:
        found: dict[str, RewardFunction] = {}
        for name, config in named.items():
            with world.phase(f"importing {config.function}"):
                pool = error = None
                if world.is_first_of_model():
                    try:
                        pool = stack.enter_context(_pool(setting.format(name), config))
                    except UserError as problem:
                        error = problem
                for problem in filter(None, collectives.of_all_ranks(error)):
                    raise problem
            found[name] = RewardFunction(
                pool=pool, arguments=config.arguments, lost_reward=config.lost_reward
            )
        yield found


def _pool(setting: str, config: RewardConfig) -> WorkerPool:
    assert config.function is not None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = config.workers or max(1, cores // world.place_on_node()[1])
    memory = None if config.memory_gb is None else int(config.memory_gb * 2**30)
    return WorkerPool(setting, config.function, workers=workers, seconds=config.timeout, memory=memory)


def score_by_functions(
    functions: Mapping[str, RewardFunction],
    rollout: Rollout,
    prompts: Mapping[int, Row],
    *,
    text: Callable[[Rollout, int], str],
    block: str = "trainer.ppo.rewards.",
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return each function's [N] float32 rewards, and [N] float32 which of them were lost, as 1; on every rank.

    Called by all ranks.

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
        parts = collectives.of_all_ranks(_score(functions, rollout, prompts, text, block))
    for part in parts:
        if isinstance(part, UserError):
            raise NotFinite(part)
    rewards, lost = dict[str, Tensor](), dict[str, Tensor]()
    for name, function in functions.items():
        found = {
            row: reward for part in parts if isinstance(part, dict) for row, reward in part[name].items()
        }
        every = [found[row] for row in range(rollout.num_rows)]
        rewards[name] = torch.tensor([function.lost_reward if reward is None else reward for reward in every])
        lost[name] = torch.tensor([float(reward is None) for reward in every])
    return rewards, lost


def _score(
    functions: Mapping[str, RewardFunction],
    rollout: Rollout,
    prompts: Mapping[int, Row],
    text: Callable[[Rollout, int], str],
    block: str,
) -> dict[str, dict[int, float | None]] | UserError:
    """Each function's rewards of rows, None of those that are lost; an error instead where one failed."""
    calls: dict[int, dict[str, Any]] = {}
    if world.is_first_of_model():
        for row, number in enumerate(map(int, rollout.group)):
            if number in prompts:
                prompt = prompts[number]
                given = {"prompt": prompt.text, "response": text(rollout, row)}
                calls[row] = {**given, "tokens": rollout.response(row), "row": dict(prompt.extras)}
    found: dict[str, dict[int, float | None]] = {}
    for name, function in functions.items():
        whole = [{**function.arguments, **call} for call in calls.values()]
        try:
            replies = function.pool.call_all(whole) if function.pool is not None else []
        except UserError as error:
            return error
        by_row = dict(zip(calls, replies, strict=True))
        lost = {row: reply.lost for row, reply in by_row.items() if reply.lost}
        for row, reply in by_row.items():
            if not (reply.lost or _is_number(reply)):
                problem = f": {reply.error}" if reply.error else f" gave {reply.value}"
                return UserError(
                    f"{block}{name}{problem}; the row: {calls[row]['row']}", fix="correct the function"
                )
        for row, why in [*lost.items()][:1]:
            logger.warning(
                "%s%s: %d of %d calls are lost, with a reward of %g each. Of the first, %s; the row: %s",
                *(block, name, len(lost), len(calls), function.lost_reward, why, calls[row]["row"]),
            )
        found[name] = {row: None if reply.lost else float(reply.value) for row, reply in by_row.items()}
    return found


def _is_number(reply: Reply) -> bool:
    return isinstance(reply.value, int | float) and math.isfinite(reply.value)


def weighted_sum(
    rewards: Mapping[str, Tensor], configs: Mapping[str, RewardConfig], *, normalizes: bool = True
) -> Tensor:
    """Return the sum of [N] ``rewards``, each clipped, normalized and weighted as its config says.

    Args:
        rewards: by name; one without a config counts once, as it is.
        configs: by name.
        normalizes: whether those that say so are normalized.

    >>> two = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([4.0, 0.0])}
    >>> weighted_sum(two, {"b": RewardConfig(weight=0.5)}), weighted_sum(two, {"b": RewardConfig(normalize=True)})
    (tensor([3., 2.]), tensor([2., 1.]))
    """
    first, *others = [_shaped(reward, configs.get(name), normalizes) for name, reward in rewards.items()]
    return sum(others, first)


def _shaped(reward: Tensor, config: RewardConfig | None, normalizes: bool) -> Tensor:
    if config is None:
        return reward
    if config.clip is not None:
        reward = reward.clamp(-config.clip, config.clip)
    if config.normalize and normalizes:
        reward = whiten(reward, torch.ones_like(reward, dtype=torch.bool), Moments.of(reward))
    return reward if config.weight == 1 else config.weight * reward
