# SPDX-License-Identifier: Apache-2.0
"""Scores of responses before the update: rewards, values, and log-probs of two policies."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nemo_aligner.algorithms.episodes import Environments
from nemo_aligner.algorithms.judge import Judge
from nemo_aligner.algorithms.ppo_config import RewardConfig
from nemo_aligner.algorithms.rewards import CalledReward, NamedRewards, score_by_functions, weighted_sum
from nemo_aligner.algorithms.rollout import RolloutSettings, per_token_over_ranks, trim_padding
from nemo_aligner.algorithms.sampler import Sampled
from nemo_aligner.algorithms.skips import NotFinite, check_finite
from nemo_aligner.errors import UserError
from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface, TeacherInterface
from nemo_aligner.objectives.credit import overlong_rewards, teacher_rewards
from nemo_aligner.parallel import collectives
from nemo_aligner.rollout_batch import Rollout, ScoredRollout
from nemo_aligner.run.schedule import limited
from nemo_aligner.run.stopwatch import Stopwatch
from nemo_aligner.serving.proxies import CriticProxy, PendingReply, RewardProxy


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The requests to servers that are on their way."""

    critic: PendingReply[tuple[Tensor, Tensor]] | None = None  # (rewards, values)
    rewards: Mapping[str, PendingReply[Tensor]] = field(default_factory=dict[str, PendingReply[Tensor]])

    @property
    def seconds(self) -> float:
        """The longest from asking to a reply, once all are there; 0 without servers, and on other ranks than 0."""
        every = [*self.rewards.values(), *([] if self.critic is None else [self.critic])]
        return max((reply.seconds for reply in every), default=0.0)


@dataclass(frozen=True, kw_only=True)
class RewardSources:
    """The sources of rewards and values."""

    # gives values, and rewards too where it has a reward model; None: no critic
    critic: CriticProxy | None = None
    # all others by name in trainer.ppo.rewards
    servers: Mapping[str, RewardProxy] = field(default_factory=dict[str, RewardProxy])
    functions: Mapping[str, CalledReward] = field(default_factory=dict[str, CalledReward])
    judges: Mapping[str, Judge] = field(default_factory=dict[str, Judge])
    environments: Environments | None = None  # reward responses while these are generated


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Rewards and values of N responses of S positions."""

    rewards: Tensor  # [N] float, the weighted sum
    values: Tensor  # [N, S] float; zeros where no critic is asked
    # each reward of trainer.ppo.rewards, [N] float, NaN where a response has none; and what NamedRewards reports
    by_name: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Asks servers, functions and the policies. Every method is called by all ranks, each with the whole rollout.

    Shapes: N responses, S positions.
    """

    policy: AlignableGenerativeInterface
    rollouts: RolloutSettings
    sources: RewardSources
    served: str | None = "reward_model"  # the name of the reward that the critic gives; None: it gives none
    rewards: Mapping[str, RewardConfig] = field(default_factory=dict[str, RewardConfig])
    give_up: Callable[[], bool] = lambda: False  # asked on rank 0 while it waits for a server
    # whether the initial policy is asked; else the policy as it is stands for it
    with_reference: bool = False
    # is asked in the initial policy's place; without rewards, a response's is the mean over its tokens of the teacher's
    # log-prob less the policy's
    teacher: TeacherInterface | None = None

    def score(
        self, sampled: Sampled, watch: Stopwatch, *, given: Scores | None = None
    ) -> tuple[ScoredRollout, Scores]:
        """The rollout with all that is known of it; servers work while log-probs are computed.

        Args:
            sampled: the rollout.
            watch: the clock.
            given: the scores, which nobody is asked for then.

        Raises:
            CriticUnavailable: a server does not reply.
            NotFinite: a number is infinite or NaN, or a reward function failed.
            WaitCancelled: it was given up.
        """
        rollout = sampled.rollout
        asked = self.request_scores(rollout) if given is None else Asked()
        with watch("logprobs"):
            own = reference = self._logprobs(self.policy, rollout)
        if self.teacher is not None:
            with watch("teacher_logprobs"):
                reference = self._logprobs(self.teacher, rollout)
        elif self.with_reference:
            with watch("init_logprobs"), self.policy.as_reference():
                reference = self._logprobs(self.policy, rollout)
        scores = given or self.collect_scores(asked, sampled, watch)
        if asked.critic or asked.rewards:
            watch.note("critic_infer_time", asked.seconds)
        responses = rollout.loss_tokens()
        other = "teacher" if self.teacher is not None else "initial policy"
        known = {"log-probs": own[responses], f"{other}'s log-probs": reference[responses]}
        fix = "set model.optim.lr lower; with trainer.precision=16 try bf16 or 32"
        check_finite(known, fix=fix)
        if self.teacher is not None and not scores.by_name:
            scores = replace(scores, rewards=teacher_rewards(own, reference, responses))
        scored = rollout.extended(
            ScoredRollout,
            logprobs=torch.where(responses, own, 0),
            reference_logprobs=torch.where(responses, reference, 0),
            rewards=scores.rewards,
            values=torch.where(responses, scores.values, 0),
        )
        return scored, scores

    def score_validation(self, sampled: Sampled, watch: Stopwatch) -> Scores:
        """As :meth:`score`, without the log-probs of policies; a teacher, which rewards may be of, is asked."""
        if self.teacher is not None:
            return self.score(sampled, watch)[1]
        asked = self.request_scores(sampled.rollout)
        return self.collect_scores(asked, sampled, watch, normalizes=False)

    def rewards_of(self, sampled: Sampled, watch: Stopwatch) -> Scores:
        """As :meth:`collect_scores`, of servers that are asked now."""
        return self.collect_scores(self.request_scores(sampled.rollout), sampled, watch)

    def _logprobs(self, model: TeacherInterface | AlignableGenerativeInterface, rollout: Rollout) -> Tensor:
        return per_token_over_ranks(
            rollout,
            lambda part: model.logprobs(part, self.rollouts.sampling),
            rows=self.rollouts.config.scoring_rows,
            multiple=self.rollouts.length_multiple,
        )

    def request_scores(self, rollout: Rollout) -> Asked:
        """Ask the servers for scores while this job works on.

        A rollout is one request: the critic changes to the reward model's weights once for it.
        """
        # Without what rollout_batch_seq_length pads, which remote_critic_rm.pad_to_length may not hold.
        batch, rows = trim_padding(rollout, multiple=1), self.rollouts.config.num_rollout_samples
        critic = self.sources.critic
        return Asked(
            critic=None if critic is None else critic.score(batch, rows=rows),
            rewards={name: one.score(batch, rows=rows) for name, one in self.sources.servers.items()},
        )

    def collect_scores(
        self, asked: Asked, sampled: Sampled, watch: Stopwatch, *, normalizes: bool = True
    ) -> Scores:
        """Collect the scores of reward functions, and of servers that were ``asked``.

        Args:
            asked: the servers.
            sampled: the rollout.
            watch: the clock.
            normalizes: whether rewards that are to be normalized are.

        Raises:
            CriticUnavailable: a server does not reply.
            NotFinite: a number is infinite or NaN, a function failed, or a response has no reward.
            WaitCancelled: the wait was given up.
        """
        rollout, scored = sampled.rollout, NamedRewards()
        if functions := self.sources.functions:
            with watch("reward_functions"):
                scored = score_by_functions(
                    functions, rollout, sampled.prompts, text=self.rollouts.response_text
                )
        found = {**sampled.episodes.rewards, **scored.rewards}
        for name, judge in self.sources.judges.items():
            with watch("judge"):
                found[name] = judge.score(rollout, sampled.prompts, text=self.rollouts.response_text)
        for name, config in self.rewards.items():
            if config.overlong_buffer is not None:
                longest = self.rollouts.sampling.max_length
                buffer = limited(longest, config.overlong_buffer)
                found[name] = overlong_rewards(rollout.loss_lengths(), longest=longest, buffer=buffer)
        with watch("critic_wait"):
            served = {name: one.result(give_up=self.give_up) for name, one in asked.rewards.items()}
            values = torch.zeros(rollout.tokens.shape)
            if asked.critic is not None:
                given, values = asked.critic.result(give_up=self.give_up)
                served |= {} if self.served is None else {self.served: given}
        fix = "look at the critic's loss and at the reward model; with trainer.precision=16 serve them in bf16 or 32"
        for name, reward in served.items():
            check_finite({"rewards": reward}, fix=fix)
            found[name] = reward.float()
        found = self._of_their_rows(found, sampled)
        rewards = torch.zeros(rollout.num_rows)
        if found:
            rewards = weighted_sum(found, self.rewards, normalizes=normalizes)
        check_finite({"rewards": rewards, "values": values}, fix=fix)
        values = torch.nn.functional.pad(values, (0, rollout.seq_length - values.shape[1]))
        found |= {**sampled.episodes.reported, **scored.reported}
        return Scores(rewards=rewards, values=values.float(), by_name=found if self.rewards else {})

    def _of_their_rows(self, found: Mapping[str, Tensor], sampled: Sampled) -> dict[str, Tensor]:
        """The rewards, NaN where RewardConfig.rows leaves a response out.

        Raises:
            NotFinite: a response has no reward at all.
        """
        of_some = {name: config for name, config in self.rewards.items() if config.rows}
        if not of_some:
            return dict(found)
        mine = {
            number: [name for name, config in of_some.items() if config.applies_to(row.extras)]
            for number, row in sampled.prompts.items()
        }
        every = collectives.merged_over_data_parallel(mine)
        rollout, kept = sampled.rollout, dict(found)
        for name in of_some:
            has = torch.tensor([name in every[int(number)] for number in rollout.group])
            kept[name] = torch.where(has, found[name], torch.nan)
        without = torch.stack([reward.isnan() for reward in kept.values()]).all(0)
        if without.any():
            prompt = self.rollouts.decode(rollout.prompt(int(without.nonzero()[0])))
            raise NotFinite(
                UserError(
                    f"{int(without.sum())} responses have no reward, as trainer.ppo.rewards' rows leave them out; the "
                    f"first is to {prompt!r}",
                    fix="give each row of the data a reward, or one of the rewards no rows",
                )
            )
        return kept
