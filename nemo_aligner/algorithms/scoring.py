# SPDX-License-Identifier: Apache-2.0
"""What is known of answers before anything is learned: rewards, values, and log-probs of two policies."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nemo_aligner.algorithms.rollout import Rollouts, cut, per_token
from nemo_aligner.algorithms.skips import check_finite
from nemo_aligner.batch import Rollout, Scored
from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface
from nemo_aligner.run.stopwatch import Stopwatch
from nemo_aligner.serving.shared import Pending, SharedCritic

__all__ = ["Scorer"]


@dataclass(frozen=True)
class Scorer:
    """Asks the critic and the policies. Every method is called by all ranks, each with the whole rollout.

    Shapes: N answers, S positions.
    """

    policy: AlignableGenerativeInterface
    critic: SharedCritic
    rollouts: Rollouts
    give_up: Callable[[], bool]  # asked on rank 0 while it waits for the critic

    def score(self, rollout: Rollout, watch: Stopwatch, *, with_reference: bool) -> Scored:
        """The rollout with all that is known of it; the critic judges while log-probs are computed.

        Args:
            with_reference: whether the initial policy is asked; else the policy stands for it.

        Raises:
            CriticLost: there is no judgement.
            NotFinite: a number is infinite or NaN.
            WaitEnded: it was given up.
        """
        asked = self.ask(rollout)
        with watch("logprobs"):
            own = reference = self._logprobs(rollout)
        if with_reference:
            with watch("init_logprobs"), self.policy.as_reference():
                reference = self._logprobs(rollout)
        with watch("critic_wait"):
            rewards, values = self.judgement(asked, rollout)
        watch.note("critic_infer_time", asked.seconds)
        answers = rollout.learned()
        known = {"log-probs": own[answers], "initial policy's log-probs": reference[answers]}
        cure = "set model.optim.lr lower; with trainer.precision=16 try bf16 or 32"
        check_finite(known, cure=cure)
        return Scored(
            **{field.name: getattr(rollout, field.name) for field in fields(rollout)},
            logprobs=torch.where(answers, own, 0),
            reference_logprobs=torch.where(answers, reference, 0),
            rewards=rewards,
            values=torch.where(answers, values, 0),
        )

    def _logprobs(self, rollout: Rollout) -> Tensor:
        return per_token(
            rollout,
            lambda part: self.policy.logprobs(part, self.rollouts.sampling),
            rows=self.rollouts.config.scoring_rows,
            multiple=self.rollouts.length_multiple,
        )

    def ask(self, rollout: Rollout) -> Pending[tuple[Tensor, Tensor]]:
        """Have the critic judge; it does so while this job works on.

        A rollout is one request: the critic changes to the reward model's weights once for it.
        """
        # Without what rollout_batch_seq_length pads, which remote_critic_rm.pad_to_length may not hold.
        return self.critic.judge(cut(rollout, multiple=1), rows=self.rollouts.config.num_rollout_samples)

    def judgement(self, asked: Pending[tuple[Tensor, Tensor]], rollout: Rollout) -> tuple[Tensor, Tensor]:
        """(rewards [N], values [N, S]) as the critic replies.

        Raises:
            CriticLost: it does not.
            NotFinite: with numbers that are infinite or NaN.
            WaitEnded: the wait was given up.
        """
        rewards, values = asked.result(give_up=self.give_up)
        cure = "look at the critic's loss and at the reward model; with trainer.precision=16 serve them in bf16 or 32"
        check_finite({"rewards": rewards, "values": values}, cure=cure)
        values = torch.nn.functional.pad(values, (0, rollout.seq_length - values.shape[1]))
        return rewards.float(), values.float()
