# SPDX-License-Identifier: Apache-2.0
"""Metrics of a rollout."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_aligner.algorithms.collector import Collected
from nemo_aligner.algorithms.scoring import Scores
from nemo_aligner.objectives.credit import differing
from nemo_aligner.objectives.reduce import Moments, kl_k3
from nemo_aligner.rollout_batch import Rollout, ScoredRollout


def rollout_metrics(
    group: str, rollout: Rollout, scores: Scores, *, initial: Sequence[float] = ()
) -> dict[str, float]:
    """Return what there is to log of responses and their rewards; of scored ones the trainer's log-probs too.

    ``initial`` are the initial policy's rewards, as of :func:`win_rate`.
    """
    lengths = rollout.loss_lengths().double()
    metrics = {
        "rollout_size": float(rollout.num_rows),
        "response_lengths": lengths.mean().item(),
        "prompt_lengths": rollout.prompt_lengths.double().mean().item(),
        "generation_length": lengths.max().item(),
        "rewards": Moments.of(scores.rewards).mean.item(),
        "rewards_std": Moments.of(scores.rewards).std.item(),
        "fraction_of_samples_properly_ended": rollout.finished.double().mean().item(),
    }
    has = {name: each[~each.isnan()] for name, each in scores.by_name.items()}
    metrics |= {f"rewards/{name}": Moments.of(each).mean.item() for name, each in has.items() if each.numel()}
    metrics |= win_rate(scores.rewards, initial)
    if isinstance(rollout, ScoredRollout):
        metrics |= _sampler_mismatch(rollout)
    return {f"{group}/{name}": value for name, value in metrics.items()}


def win_rate(rewards: Tensor, initial: Sequence[float]) -> dict[str, float]:
    """Return how often a response has a higher reward than the initial policy's to its prompt; equal ones are half.

    Args:
        rewards: [N] float.
        initial: the initial policy's; of another number there is nothing to compare.

    >>> win_rate(torch.tensor([1.0, 2.0, 3.0, 0.0]), [0.0, 2.0, 1.0, 1.0])
    {'win_rate': 0.625}
    """
    if len(initial) != rewards.numel():
        return {}
    apart = rewards.double() - torch.tensor(initial, dtype=torch.float64)
    return {"win_rate": ((apart > 0).double() + (apart == 0).double() / 2).mean().item()}


def table_rows(
    rollout: Rollout, rewards: Tensor, decode: Callable[[Sequence[int]], str], *, most: int
) -> list[dict[str, Any]]:
    """Return the first responses of a rollout, with all that was replied between their turns, for people to read."""
    return [
        {
            "prompt": decode(rollout.prompt(i)),
            "response": decode(rollout.conversation(i)),
            "reward": float(rewards[i]),
        }
        for i in range(min(most, rollout.num_rows))
    ]


def _sampler_mismatch(scored: ScoredRollout) -> dict[str, float]:
    """The difference between the log-probs of the trainer and those of the sampler."""
    responses = scored.loss_tokens()
    apart = (scored.logprobs - scored.sampler_logprobs)[responses].double()
    drawn = scored.sampler_logprobs[responses].double()
    return {
        "logprob_difference_mean": apart.abs().mean().item(),
        "logprob_difference_max": apart.abs().max().item(),
        "sampler_kl": kl_k3(drawn, drawn + apart).mean().item(),
    }


def learning_metrics(
    group: str, found: Collected, moments: dict[str, Moments], coefficient: float
) -> dict[str, float]:
    """Those of :func:`rollout_metrics`, and of the credit, of which ``moments`` are credit.statistics.

    Where prompts have several responses, "equal_groups" is the share of those whose rewards are all equal, exactly.
    """
    means = ("init_policy_kl", "rewards_with_kl", "answer_kl")
    spreads = [name for name in ("advantages", "returns", "values") if name in moments]
    metrics = {
        **{name: moments[name].mean.item() for name in means},
        **{f"{name}_mean": moments[name].mean.item() for name in spreads},
        **{f"{name}_std": moments[name].std.item() for name in spreads},
        "kl_coefficient": coefficient,
        **found.metrics,
    }
    if int(torch.bincount(found.scored.group).max()) > 1:
        unequal = differing(found.scored.rewards, found.scored.group)
        metrics["equal_groups"] = 1 - unequal.double().mean().item()
    return rollout_metrics(group, found.scored, found.scores) | {
        f"{group}/{key}": value for key, value in metrics.items()
    }


def summary(metrics: dict[str, float]) -> str:
    """A step in a line."""
    return (
        f"reward {metrics['train_rollouts/rewards']:.3f}  kl {metrics['train_rollouts/init_policy_kl']:.4f}  "
        f"length {metrics['train_rollouts/response_lengths']:.0f}  loss {metrics['train_optim/loss']:.4f}  "
        f"{metrics['timers/step_time']:.1f} s"
    )
