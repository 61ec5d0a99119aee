# SPDX-License-Identifier: Apache-2.0
"""An actor and its critic's job: how they learn and save together, so that either may be killed at any moment.

Their checkpoints come in pairs. The actor's becomes one when the critic has saved its own; from then on, the train
requests before it need not be sent again. An actor that loses its critic saves alone, with the requests that the critic
has yet to learn from.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from nemo_aligner.batch import TokenBatch, ValueBatch
from nemo_aligner.checkpoint.trainer_state import TrainerState
from nemo_aligner.checkpoint.training import TrainingCheckpoints
from nemo_aligner.serving.shared import Pending, SharedCritic

__all__ = ["CriticLink"]

SIGNAL_SECONDS = 15.0  # that a critic has to save after a signal


@dataclass(frozen=True, kw_only=True)
class CriticLink:
    """Every method is called by all ranks alike."""

    critic: SharedCritic
    give_up: Callable[[], bool]  # asked on rank 0 while it waits
    steps_per_epoch: int

    def judge(self, batch: TokenBatch, *, rows: int) -> Pending[tuple[Tensor, Tensor]]:
        """(rewards [B], values [B, S]) of a batch that every rank has, asked for so many rows at a time."""
        return self.critic.judge(batch, rows=rows)

    def train(self, batch: ValueBatch, *, step: int) -> Pending[float]:
        """The critic's loss on the rollout of ``step``."""
        return self.critic.train(batch, step=step)

    def loss(self, pending: Pending[float], *, saves: bool = True) -> float:
        """Wait for what :meth:`train` asked.

        Args:
            saves: whether this job saves; else nobody goes on from before this moment, and no request is sent again.

        Raises:
            CriticLost: there is no reply.
            WaitEnded: the wait was given up.
        """
        loss = pending.result(give_up=self.give_up)
        if not saves:
            self.critic.committed(self.critic.state_dict().get("critic_sequence", 0))
        return loss

    def save_critic(self) -> None:
        """Have the critic saved, with all that it was sent before."""
        self.critic.save().result(give_up=self.give_up)

    def save(self, checkpoints: TrainingCheckpoints, state: TrainerState) -> TrainerState:
        """Save both jobs; the actor's half becomes a checkpoint when the critic's is one. Returns the state saved."""
        pending, began = self.critic.save(), time.monotonic()
        state = self._with_critic(state)
        # Of this moment: with async_save the pair may be complete some steps later.
        sequence = state.algorithm.get("critic_sequence", 0)

        def both_saved() -> None:
            # A signal leaves it some time; then this half is saved with what the critic lacks.
            pending.result(give_up=lambda: self.give_up() and time.monotonic() - began > SIGNAL_SECONDS)
            self.critic.committed(sequence)

        checkpoints.save(state, steps_per_epoch=self.steps_per_epoch, also=both_saved)
        return state

    def save_alone(self, checkpoints: TrainingCheckpoints, state: TrainerState) -> TrainerState:
        """Save without the critic: with the train requests that it is to be sent when it comes back."""
        state = self._with_critic(state)
        checkpoints.save(state, steps_per_epoch=self.steps_per_epoch, extra=self.critic.unsaved_lessons())
        return state

    def _with_critic(self, state: TrainerState) -> TrainerState:
        return replace(state, algorithm=state.algorithm | self.critic.state_dict())
