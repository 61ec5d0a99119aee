# SPDX-License-Identifier: Apache-2.0
"""Optimizer steps on a rollout: in which order its responses are learned from, and on which rank."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nemo_aligner.algorithms.rollout import RolloutSettings, balance_micro_batches, lengths_of, trim_padding
from nemo_aligner.algorithms.skips import counted
from nemo_aligner.batch import PreferenceBatch, TokenBatch
from nemo_aligner.checkpoint.trainer_state import TrainerState
from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface
from nemo_aligner.objectives.protocol import Objective
from nemo_aligner.parallel import world
from nemo_aligner.run.metrics import means

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Updates:
    """Trains ``policy`` on ``objective``."""

    policy: AlignableGenerativeInterface
    objective: Objective
    rollouts: RolloutSettings
    num_epochs: int  # passes over each rollout

    @property
    def per_rollout(self) -> int:
        """Optimizer steps on one rollout."""
        return self.num_epochs * self.rollouts.num_rows // self.rollouts.global_batch_size

    def update(
        self, learned: TokenBatch, state: TrainerState, *, step: int, done: int
    ) -> tuple[dict[str, float], TrainerState]:
        """Means over the updates that were not skipped, the number of those that were, and the state after them.

        Args:
            learned: the rollout's rows.
            done: optimizer steps before.
        """
        found: list[dict[str, float]] = []
        empty: list[dict[str, float]] = []  # steps on nothing but responses that are left out
        skipped: list[dict[str, float]] = []
        for number, rows in enumerate(self._global_batches(step), done + 1):
            part = _rows(learned, rows)
            sums = self.policy.get_loss_and_metrics(
                self._micro_batches(part), self.objective, forward_only=False, sampling=self.rollouts.sampling
            )
            metrics = means(sums) | self.policy.optimizer_step()
            state = counted(state, metrics, step=number)
            of = skipped if metrics["skipped_steps"] else found if part.loss_tokens().any() else empty
            of.append(metrics)
        world.synchronize()
        if empty and world.is_logging_rank():
            logger.warning(
                "no response of %d of %d updates counts in the loss: %s",
                *(len(empty), self.per_rollout, self._why_empty(learned)),
            )
        of = found or empty or skipped
        kept = {f"train_optim/{name}": sum(m[name] for m in of) / len(of) for name in of[0]}
        if isinstance(learned, PreferenceBatch):
            kept["train_optim/pair_fraction"] = learned.real_pairs().double().mean().item()
        return kept | {"train_optim/skipped_steps": float(len(skipped))}, state

    def _why_empty(self, learned: TokenBatch) -> str:
        if isinstance(learned, PreferenceBatch):
            return "the rewards of all responses to a prompt are equal, which makes no pair"
        return (
            f"all were cut at model.ppo.length_params.max_length={self.rollouts.sampling.max_length} tokens with "
            "trainer.ppo.mask_unfinished=True, or, with best_of_n, none is the best to its prompt"
        )

    def _global_batches(self, step: int) -> Iterator[list[int]]:
        size = self.rollouts.global_batch_size
        for epoch in range(self.num_epochs):
            draw = np.random.default_rng([self.rollouts.seed, step, epoch])
            order = [int(row) for row in draw.permutation(self.rollouts.num_rows)]
            yield from (order[i : i + size] for i in range(0, self.rollouts.num_rows, size))

    def _micro_batches(self, batch: TokenBatch) -> list[TokenBatch]:
        """This rank's micro-batches of a global batch that every rank has."""
        rollouts, multiple, each = self.rollouts, self.rollouts.length_multiple, batch.sequences_per_row
        sequences = lengths_of(batch)
        lengths = [max(sequences[i : i + each]) for i in range(0, len(sequences), each)]
        shares = balance_micro_batches(lengths, rows=rollouts.micro_batch_size, ranks=world.dp_size())
        # Pipeline stages exchange one shape.
        longest = max(lengths) if world.pp_size() > 1 else None
        return [
            trim_padding(_rows(batch, rows), multiple=multiple, longest=longest)
            for rows in shares[world.dp_rank()]
        ]


def _rows(batch: TokenBatch, rows: Sequence[int]) -> TokenBatch:
    """Rows of data: all sequences of each."""
    each = batch.sequences_per_row
    return batch.take([each * row + i for row in rows for i in range(each)])
