# SPDX-License-Identifier: Apache-2.0
"""What is known of responses before anything is learned: rewards, values, and log-probs of two policies."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from nemo_aligner.algorithms.ppo_config import RewardConfig
from nemo_aligner.algorithms.rewards import RewardFunction, score_by_functions, weighted_sum
from nemo_aligner.algorithms.rollout import Rollouts, cut, per_token
from nemo_aligner.algorithms.skips import check_finite
from nemo_aligner.batch import Rollout, Scored
from nemo_aligner.data.sample import PromptSample
from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface
from nemo_aligner.run.stopwatch import Stopwatch
from nemo_aligner.serving.shared import Pending, SharedCritic, SharedReward

Reply = Pending[tuple[Tensor, Tensor]] | Pending[Tensor] | None


@dataclass(frozen=True, kw_only=True)
class RewardSources:
    """Who judges responses."""

    # gives values, and rewards too where it has a reward model; None: no critic
    critic: SharedCritic | None = None
    reward: SharedReward | None = None  # a reward model where there is no critic
    functions: Mapping[str, RewardFunction] = field(
        default_factory=dict[str, RewardFunction]
    )  # by name in trainer.ppo.rewards


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What servers and functions say of N responses of S positions."""

    rewards: Tensor  # [N] float, the weighted sum
    values: Tensor  # [N, S] float; zeros where no critic is asked
    by_name: Mapping[str, Tensor]  # each reward of trainer.ppo.rewards: [N] float


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Asks servers, functions and the policies. Every method is called by all ranks, each with the whole rollout.

    Shapes: N responses, S positions.
    """

    policy: AlignableGenerativeInterface
    rollouts: Rollouts
    sources: RewardSources
    served: str | None = "reward_model"  # the served reward's name; None: there is none
    rewards: Mapping[str, RewardConfig] = field(default_factory=dict[str, RewardConfig])
    give_up: Callable[[], bool] = lambda: False  # asked on rank 0 while it waits for a server

    def score(
        self, rollout: Rollout, prompts: Mapping[int, PromptSample], watch: Stopwatch, *, with_reference: bool
    ) -> tuple[Scored, Scores]:
        """The rollout with all that is known of it; servers work while log-probs are computed.

        Args:
            prompts: this data parallel rank's, by number.
            with_reference: whether the initial policy is asked; else the policy stands for it.

        Raises:
            CriticLost: a server does not reply.
            NotFinite: a number is infinite or NaN, or a reward function failed.
            WaitEnded: it was given up.
        """
        asked = self.ask(rollout)
        with watch("logprobs"):
            own = reference = self._logprobs(rollout)
        if with_reference:
            with watch("init_logprobs"), self.policy.as_reference():
                reference = self._logprobs(rollout)
        scores = self.scores(asked, rollout, prompts, watch)
        if asked is not None:
            watch.note("critic_infer_time", asked.seconds)
        responses = rollout.learned()
        known = {"log-probs": own[responses], "initial policy's log-probs": reference[responses]}
        cure = "set model.optim.lr lower; with trainer.precision=16 try bf16 or 32"
        check_finite(known, cure=cure)
        scored = Scored(
            **{field.name: getattr(rollout, field.name) for field in fields(rollout)},
            logprobs=torch.where(responses, own, 0),
            reference_logprobs=torch.where(responses, reference, 0),
            rewards=scores.rewards,
            values=torch.where(responses, scores.values, 0),
        )
        return scored, scores

    def _logprobs(self, rollout: Rollout) -> Tensor:
        return per_token(
            rollout,
            lambda part: self.policy.logprobs(part, self.rollouts.sampling),
            rows=self.rollouts.config.scoring_rows,
            multiple=self.rollouts.length_multiple,
        )

    def ask(self, rollout: Rollout) -> Reply:
        """Have the servers judge, while this job works on; None where there is none.

        A rollout is one request: the critic changes to the reward model's weights once for it.
        """
        # Without what rollout_batch_seq_length pads, which remote_critic_rm.pad_to_length may not hold.
        batch, rows = cut(rollout, multiple=1), self.rollouts.config.num_rollout_samples
        server = self.sources.critic or self.sources.reward
        return None if server is None else server.judge(batch, rows=rows)

    def scores(
        self, asked: Reply, rollout: Rollout, prompts: Mapping[int, PromptSample], watch: Stopwatch
    ) -> Scores:
        """What functions say, and servers that were ``asked``.

        Raises:
            CriticLost: a server does not reply.
            NotFinite: a number is infinite or NaN, or a function failed.
            WaitEnded: the wait was given up.
        """
        found: dict[str, Tensor] = {}
        if functions := self.sources.functions:
            with watch("reward_functions"):
                found = score_by_functions(functions, rollout, prompts, text=self.rollouts.response_text)
        with watch("critic_wait"):
            replied = None if asked is None else asked.result(give_up=self.give_up)
        served, values = (
            replied if isinstance(replied, tuple) else (replied, torch.zeros(rollout.tokens.shape))
        )
        if self.served is not None:
            assert served is not None, "a served reward has a server"
            found[self.served] = served.float()
        rewards = weighted_sum(found, self.rewards)
        cure = "look at the critic's loss and at the reward model; with trainer.precision=16 serve them in bf16 or 32"
        check_finite({"rewards": rewards, "values": values}, cure=cure)
        values = torch.nn.functional.pad(values, (0, rollout.seq_length - values.shape[1]))
        return Scores(rewards=rewards, values=values.float(), by_name=found if self.rewards else {})
