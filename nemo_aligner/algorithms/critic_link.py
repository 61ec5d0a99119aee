# SPDX-License-Identifier: Apache-2.0
"""An actor and its critic's job: how they learn and save together, so that either may be killed at any moment.

Their checkpoints come in pairs. The actor's becomes one when the critic has saved its own; from then on, the train
requests before it need not be sent again. An actor that loses its critic saves alone, with the requests that the critic
has yet to learn from.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from nemo_aligner.checkpoint.trainer_state import TrainerState
from nemo_aligner.checkpoint.training import TrainingCheckpoints
from nemo_aligner.rollout_batch import ValueBatch
from nemo_aligner.run.stopwatch import Stopwatch
from nemo_aligner.serving.proxies import CriticProxy, PendingReply

LOSS = "train_critic/loss"
SIGNAL_SECONDS = 15.0  # that a critic has to save after a signal


@dataclass(frozen=True, kw_only=True)
class PPOState:
    """The state that an actor resumes from, beside its weights."""

    kl: dict[str, float]  # of the KL controller
    reward_scaling: dict[str, float]
    ppo_optimization_step: int = 0  # optimizer steps done
    further_rounds: int = 0  # batches of prompts that steps have taken beside their first
    validated_step: int | None = None  # the step of the last validation
    # of the validation before the first step, if there was one: its rewards, and a digest of its prompts
    initial_val_rewards: list[float] = field(default_factory=list[float])
    initial_val_data: dict[str, Any] = field(default_factory=dict[str, Any])
    run_id: str = ""  # under which the critic knows the run
    critic_sequence: int = 0  # train requests that the critic was sent
    lacks_critic_loss: bool = False  # the last step was logged without it

    def validated(self, step: int, rewards: Tensor, data: dict[str, object]) -> "PPOState":
        """The state after a validation.

        Args:
            rewards: [N] float, of its responses.
            data: a digest of its prompts.
        """
        if step > 0:
            return replace(self, validated_step=step)
        return replace(
            self, validated_step=0, initial_val_rewards=[*map(float, rewards)], initial_val_data=data
        )

    def initial_rewards(self, data: dict[str, object]) -> list[float]:
        """The initial policy's rewards, if they are of the prompts that ``data`` is a digest of; else none."""
        return self.initial_val_rewards if self.initial_val_data == data else []


@dataclass(frozen=True, kw_only=True)
class CriticLink:
    """Every method is called by all ranks alike."""

    critic: CriticProxy
    give_up: Callable[[], bool]  # asked on rank 0 while it waits
    steps_per_epoch: int

    def train(self, batch: ValueBatch, *, step: int) -> PendingReply[float]:
        """The critic's loss on the rollout of ``step``."""
        return self.critic.train(batch, step=step)

    def loss(self, pending: PendingReply[float], *, saves: bool = True) -> float:
        """Wait for what :meth:`train` asked.

        Args:
            saves: whether this job saves; else nobody goes on from before this moment, and no request is sent again.

        Raises:
            CriticUnavailable: there is no reply.
            WaitCancelled: the wait was given up.
        """
        loss = pending.result(give_up=self.give_up)
        if not saves:
            self.critic.committed(self.critic.sequence)
        return loss

    def timed_loss(self, pending: PendingReply[float], watch: Stopwatch, *, saves: bool) -> dict[str, float]:
        """The metric of :meth:`loss`; ``watch`` gets how long the wait and the training took."""
        with watch("critic_train_wait"):
            loss = self.loss(pending, saves=saves)
        watch.note("critic_train_time", pending.seconds)
        return {LOSS: loss}

    def last_loss(self) -> dict[str, float]:
        """The metric of :meth:`timed_loss` of the last step, once more."""
        return {LOSS: self.critic.last_loss().result(give_up=self.give_up)}

    def save_critic(self) -> None:
        """Have the critic saved, with all that it was sent before."""
        self.critic.save().result(give_up=self.give_up)

    def save(self, checkpoints: TrainingCheckpoints, state: TrainerState, own: PPOState) -> None:
        """Save both jobs; the actor's half becomes a checkpoint when the critic's is one."""
        # Of this moment: with async_save the pair may be complete some steps later.
        pending, began, sequence = self.critic.save(), time.monotonic(), self.critic.sequence

        def both_saved() -> None:
            # A signal leaves it some time; then this half is saved with what the critic lacks.
            pending.result(give_up=lambda: self.give_up() and time.monotonic() - began > SIGNAL_SECONDS)
            self.critic.committed(sequence)

        checkpoints.save(self._whole(state, own), steps_per_epoch=self.steps_per_epoch, also=both_saved)

    def save_alone(self, checkpoints: TrainingCheckpoints, state: TrainerState, own: PPOState) -> None:
        """Save without the critic: with the train requests that it is to be sent when it comes back."""
        requests = self.critic.pending_train_requests()
        checkpoints.save(self._whole(state, own), steps_per_epoch=self.steps_per_epoch, extra=requests)

    def _whole(self, state: TrainerState, own: PPOState) -> TrainerState:
        own = replace(own, run_id=self.critic.run_id, critic_sequence=self.critic.sequence)
        return replace(state, algorithm=asdict(own))
