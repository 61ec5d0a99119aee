# SPDX-License-Identifier: Apache-2.0
"""Scored rollouts; with dynamic sampling those of groups that there is something to learn from."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from nemo_aligner.algorithms.rollout import PromptSource
from nemo_aligner.algorithms.sampler import Sampled, Sampler
from nemo_aligner.algorithms.scoring import Scorer, Scores
from nemo_aligner.batch import concatenated
from nemo_aligner.data.row import Row
from nemo_aligner.objectives.credit import differing
from nemo_aligner.parallel import world
from nemo_aligner.rollout_batch import Rollout, ScoredRollout
from nemo_aligner.run.stopwatch import Stopwatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Collected:
    """The rollout of a step."""

    scored: ScoredRollout
    scores: Scores  # of its rows
    rounds: int = 1  # batches of prompts that it took
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])  # of how it was collected


@dataclass(frozen=True, kw_only=True)
class Collector:
    """Has responses drawn and scored.

    With ``most_rounds`` above 1, groups whose rewards are all equal are replaced by those of the next prompts, as often
    as that asks: dynamic sampling (DAPO, Yu 2025, arXiv 2503.14476, eq. 11). Where rounds run out, the first of such
    groups fill the rollout. Rewards alone decide, so that log-probs are computed of what is kept.
    """

    sampler: Sampler
    scorer: Scorer
    most_rounds: int

    def collect_once(self, source: PromptSource, index: int, draw: int, *, watch: Stopwatch) -> Collected:
        """As :meth:`collect`, of batch ``index`` alone."""
        scored, scores = self.scorer.score(self.sampler.sample(source, index, draw, watch=watch), watch)
        return Collected(scored=scored, scores=scores)

    def collect(self, source: PromptSource, index: int, draw: int, *, watch: Stopwatch) -> Collected:
        """The rollout of the prompts from batch ``index`` on. Called by all ranks; arguments as of Sampler.sample.

        Raises:
            CriticUnavailable: a server does not reply.
            NotFinite: a number is infinite or NaN, or a reward function failed.
            WaitCancelled: it was given up.
        """
        if self.most_rounds == 1:
            return self.collect_once(source, index, draw, watch=watch)
        rollouts: list[Rollout] = []
        found: list[Scores] = []
        known: dict[int, Row] = {}
        rewards = differ = torch.zeros(0)
        for round_ in range(self.most_rounds):
            sampled = self.sampler.sample(source, index + round_, draw, watch=watch, round_=round_)
            rollouts.append(sampled.rollout)
            found.append(self.scorer.rewards_of(sampled, watch))
            known |= sampled.prompts
            rewards = torch.cat([one.rewards for one in found])
            differ = differing(rewards, torch.cat([one.group for one in rollouts]))
            if int(differ.sum()) >= sampled.rollout.num_rows:
                break
        if not differ.any() and world.is_logging_rank():
            logger.warning(
                "the rewards of all groups are equal in each of trainer.ppo.max_sampling_rounds=%d batches of "
                "prompts, their mean is %.4g: this step learns nothing. Give prompts that the model sometimes solves, "
                "or look at the reward",
                *(len(rollouts), rewards.mean().item()),
            )
        whole, count = concatenated(rollouts), rollouts[0].num_rows
        # The rows of a group stand together, and all groups have as many.
        kept = torch.sort(torch.sort(~differ, stable=True).indices[:count]).values
        by_name = {name: torch.cat([one.by_name[name] for one in found])[kept] for name in found[0].by_name}
        values = torch.zeros(count, whole.seq_length)
        scored, scores = self.scorer.score(
            Sampled(rollout=whole.take([*map(int, kept)]), prompts=known),
            watch,
            given=Scores(rewards=rewards[kept], values=values, by_name=by_name),
        )
        metrics = {
            "sampling_rounds": float(len(rollouts)),
            "accept_rate": differ.double().mean().item(),
            "sampled_rewards": rewards.double().mean().item(),
        }
        return Collected(scored=scored, scores=scores, rounds=len(rollouts), metrics=metrics)
