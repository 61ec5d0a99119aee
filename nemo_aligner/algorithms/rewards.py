# SPDX-License-Identifier: Apache-2.0
"""Rewards of responses by Python functions, and the weighted sum of several rewards. Knows no server and no critic.

A function is called as ``function(prompt=str, response=str, tokens=list[int], row=dict) -> float``, in a process of its
own; ``row`` is the prompt's JSON object. Shapes: N responses of all ranks.
"""

import logging
import math
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nemo_aligner.algorithms.ppo_config import RewardConfig
from nemo_aligner.algorithms.skips import NotFinite
from nemo_aligner.data.row import Row
from nemo_aligner.environments.workers import WorkerPool
from nemo_aligner.errors import UserError
from nemo_aligner.objectives.reduce import Moments, whiten
from nemo_aligner.parallel import collectives, world
from nemo_aligner.rollout_batch import Rollout

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CalledReward:
    """A person's function or environment."""

    config: RewardConfig
    pool: WorkerPool | None  # on the ranks that call it


@dataclass(frozen=True, kw_only=True)
class NamedRewards:
    """Rewards of N responses, by name."""

    # [N] float32; NaN where a response has no such reward, as RewardConfig.rows has it
    rewards: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    # [N] float32 each, which are only reported: as NAME_lost, 1 where the call was out of time or its process crashed,
    # so that the reward is the lost_reward; as NAME_turns, the policy's turns in an environment. NaN as of rewards
    reported: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


@contextmanager
def open_called(
    named: Mapping[str, RewardConfig], *, setting: str, at_once: int = 1
) -> Generator[dict[str, CalledReward]]:
    """Within it, the functions and environments of the rewards can be called. Called by all ranks.

    Args:
        named: rewards with one of them, by name.
        setting: that names the code, with {0} for the reward's name and {1} for the kind of code.
        at_once: responses that a rank generates at once.

    Raises:
        UserError: there is no such function or class; on every rank.
    """
    with ExitStack() as stack:
        found: dict[str, CalledReward] = {}
        for name, config in named.items():
            assert config.called is not None, "there is something to call"
            with world.phase(f"importing {config.called[1]}"):
                pool = error = None
                if world.is_first_of_model():
                    try:
                        named_by = setting.format(name, config.called[0])
                        pool = stack.enter_context(_pool(named_by, config, at_once))
                    except UserError as problem:
                        error = problem
                for problem in filter(None, collectives.of_all_ranks(error)):
                    raise problem
            found[name] = CalledReward(config=config, pool=pool)
        yield found


def _pool(setting: str, config: RewardConfig, at_once: int) -> WorkerPool:
    assert config.called is not None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    mine = max(1, cores // world.place_on_node()[1])
    holds = config.environment is not None  # a worker while the response is generated
    return WorkerPool(
        setting,
        config.called[1],
        workers=config.workers or (max(mine, at_once) if holds else mine),
        seconds=config.timeout,
        memory=None if config.memory_gb is None else int(config.memory_gb * 2**30),
        episodes=holds,
    )


Found = dict[str, dict[int, float | None]]
"""Of each reward, by row of the rollout: None where its call was lost; without the rows that have no such reward."""


def score_by_functions(
    functions: Mapping[str, CalledReward],
    rollout: Rollout,
    prompts: Mapping[int, Row],
    *,
    text: Callable[[Rollout, int], str],
    block: str = "trainer.ppo.rewards.",
) -> NamedRewards:
    """Return each function's rewards, on every rank. Called by all ranks.

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
        return gather_rewards(
            _score(functions, rollout, prompts, text, block), functions, num_rows=rollout.num_rows
        )


def gather_rewards(
    mine: Found | UserError, called: Mapping[str, CalledReward], *, num_rows: int
) -> NamedRewards:
    """Return the rewards that the ranks have ``found``, on every rank. Called by all ranks.

    Args:
        mine: of this rank, or why there are none.
        called: by the reward's name.
        num_rows: of the rollout.

    Raises:
        NotFinite: a rank has none.
    """
    parts = collectives.of_all_ranks(mine)
    for part in parts:
        if isinstance(part, UserError):
            raise NotFinite(part)
    rewards, lost = dict[str, Tensor](), dict[str, Tensor]()
    for name, one in called.items():
        found = {
            row: reward for part in parts if isinstance(part, dict) for row, reward in part[name].items()
        }
        every = [found.get(row, math.nan) for row in range(num_rows)]
        missing = one.config.lost_reward
        rewards[name] = torch.tensor([missing if reward is None else reward for reward in every])
        lost[f"{name}_lost"] = torch.tensor(
            [float(found[row] is None) if row in found else math.nan for row in range(num_rows)]
        )
    return NamedRewards(rewards=rewards, reported=lost)


def _score(
    functions: Mapping[str, CalledReward],
    rollout: Rollout,
    prompts: Mapping[int, Row],
    text: Callable[[Rollout, int], str],
    block: str,
) -> Found | UserError:
    """The rewards by this rank's calls; an error instead where one failed."""
    calls: dict[int, dict[str, Any]] = {}
    if world.is_first_of_model():
        for row, number in enumerate(map(int, rollout.group)):
            if number in prompts:
                prompt = prompts[number]
                given = {"prompt": prompt.text, "response": text(rollout, row)}
                calls[row] = {**given, "tokens": rollout.response(row), "row": dict(prompt.extras)}
    found: Found = {}
    for name, function in functions.items():
        config = function.config
        asked = {row: call for row, call in calls.items() if config.applies_to(call["row"])}
        whole = [{**config.arguments, **call} for call in asked.values()]
        try:
            replies = function.pool.call_all(whole) if function.pool is not None else []
        except UserError as error:
            return error
        by_row = dict(zip(asked, replies, strict=True))
        for row, reply in by_row.items():
            if not (reply.lost or is_number(reply.value)):
                problem = f": {reply.error}" if reply.error else f" gave {reply.value}"
                return UserError(
                    f"{block}{name}{problem}; the row: {calls[row]['row']}", fix="correct the function"
                )
        lost = {row: reply.lost for row, reply in by_row.items() if reply.lost}
        about = [(why, calls[row]["row"]) for row, why in lost.items()]
        warn_of_lost(f"{block}{name}", config, about, of=len(asked))
        found[name] = {row: None if reply.lost else float(reply.value) for row, reply in by_row.items()}
    return found


def warn_of_lost(
    name: str, config: RewardConfig, lost: Sequence[tuple[str, Mapping[str, object]]], *, of: int
) -> None:
    """Warn of responses whose calls were lost, each with the reason and its row, among so many."""
    for why, row in lost[:1]:
        logger.warning(
            "%s: %d of %d calls are lost, with a reward of %g each. Of the first, %s; the row: %s",
            *(name, len(lost), of, config.lost_reward, why, dict(row)),
        )


def is_number(value: object) -> bool:
    """True for a finite one."""
    return isinstance(value, int | float) and math.isfinite(value)


def weighted_sum(
    rewards: Mapping[str, Tensor], configs: Mapping[str, RewardConfig], *, normalizes: bool = True
) -> Tensor:
    """Return the sum of [N] ``rewards``, each clipped, normalized and weighted as its config says.

    Args:
        rewards: by name, NaN where a response has no such reward; one without a config counts once, as it is.
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
    has = ~reward.isnan()
    reward = torch.where(has, reward, 0)
    if config.clip is not None:
        reward = reward.clamp(-config.clip, config.clip)
    if config.normalize and normalizes:
        reward = whiten(reward, has, Moments.of(reward, has))
    return reward if config.weight == 1 else config.weight * reward
