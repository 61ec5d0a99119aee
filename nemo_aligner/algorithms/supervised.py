# SPDX-License-Identifier: Apache-2.0
"""The supervised loop: batches in, an objective, steps, validation. Sees the model through its interface only."""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from nemo_aligner.batch import TokenBatch
from nemo_aligner.models.alignable_interface import SupervisedInterface
from nemo_aligner.objectives.protocol import Objective
from nemo_aligner.parallel import collectives, world
from nemo_aligner.run.experiment import Experiment
from nemo_aligner.run.progress import ProgressBar
from nemo_aligner.run.schedule import Plan, SupervisedConfig, make_plan

__all__ = ["Batches", "SupervisedTrainer"]

logger = logging.getLogger(__name__)


class Batches(Protocol):
    """A source of global batches, as this data parallel rank sees them."""

    @property
    def batches_per_epoch(self) -> int:
        """Global batches in one pass over the data."""
        ...

    @property
    def num_seen(self) -> int:
        """Samples that this rank has handed out so far."""
        ...

    @property
    def num_truncated(self) -> int:
        """Samples that this rank has cut so far."""
        ...

    def iterate(self, start: int, stop: int) -> Iterator[list[TokenBatch]]:
        """Micro-batches of global batches ``start`` to ``stop - 1``, counted on from epoch to epoch."""
        ...


class SupervisedTrainer:
    """Trains ``model`` on ``objective`` (SFT, reward models, SteerLM, distillation)."""

    def __init__(
        self,
        config: SupervisedConfig,
        model: SupervisedInterface,
        objective: Objective,
        train: Batches,
        validation: Batches,
        run: Experiment,
    ) -> None:
        self.config, self.model, self.objective = config, model, objective
        self.train, self.validation, self.run = train, validation, run
        self.plan = self.make_plan(config, train, validation)

    @staticmethod
    def make_plan(config: SupervisedConfig, train: Batches, validation: Batches) -> Plan:
        """The run in steps; the learning-rate schedule is as long as this says."""
        return make_plan(
            batches_per_epoch=train.batches_per_epoch,
            max_epochs=config.max_epochs,
            max_steps=config.max_steps,
            val_check_interval=config.val_check_interval,
            limit_train_batches=config.limit_train_batches,
            val_batches=validation.batches_per_epoch,
            limit_val_batches=config.limit_val_batches,
        )

    def fit(self) -> None:
        """Train to the end of the plan."""
        plan = self.plan
        bar = ProgressBar(total=plan.max_steps, enabled=world.is_logging_rank())
        consumed = 0
        try:
            for step, batches in enumerate(self._training_batches(), start=1):
                with world.phase(f"step {step}"):
                    metrics = self._step(batches)
                    consumed += int(metrics.pop("rows"))
                    metrics |= {"consumed_samples": consumed, "epoch": 1 + (step - 1) // plan.steps_per_epoch}
                self.run.log({f"train/{name}": value for name, value in metrics.items()}, step=step)
                bar.update(step, metrics)
                if plan.validates_after(step):
                    with world.phase(f"validation after step {step}"):
                        self.run.log(self.validate(), step=step)
        finally:
            bar.close()
        self._report_truncated()

    def _report_truncated(self) -> None:
        counts = torch.tensor([self.train.num_truncated, self.train.num_seen], device=world.device())
        truncated, seen = (int(count) for count in collectives.sum_over_data_parallel(counts))
        if truncated and world.is_logging_rank():
            logger.warning(
                "%d of %d training samples were too long and were cut: raise model.data.train_ds.max_seq_length "
                "(and model.encoder_seq_length, if it is lower), or shorten them",
                truncated,
                seen,
            )

    def validate(self) -> dict[str, float]:
        """Means over every unit of the validation data: "validation/loss" and its kin."""
        started = time.perf_counter()
        sums: dict[str, float] = {}
        units = 0.0
        for batches in self.validation.iterate(0, self.plan.val_batches):
            metrics = self.model.get_loss_and_metrics(batches, self.objective, forward_only=True)
            weight = self._count(batches)["units"]
            units += weight
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + weight * value
        means = {f"validation/{name}": value / max(units, 1) for name, value in sums.items()}
        means["validation/step_time"] = time.perf_counter() - started
        if world.is_logging_rank():
            logger.info("validation loss %.4f", means["validation/loss"])
        return means

    def _step(self, batches: Sequence[TokenBatch]) -> dict[str, float]:
        started = time.perf_counter()
        metrics = self.model.get_loss_and_metrics(batches, self.objective, forward_only=False)
        metrics |= self.model.optimizer_step()
        world.synchronize()
        counts = self._count(batches)
        seconds = time.perf_counter() - started
        return {
            **metrics,
            "step_time": seconds,
            "tokens_per_s": counts["tokens"] / seconds,
            "learned_tokens": counts["units"],
            "rows": counts["rows"],
        }

    def _count(self, batches: Sequence[TokenBatch]) -> dict[str, int]:
        """Rows, tokens and the objective's units of the global batch; rows that only fill up are not counted."""
        rows = torch.tensor(
            [
                sum(int((batch.lengths > 1).sum()) for batch in batches),
                sum(int(batch.lengths[batch.lengths > 1].sum()) for batch in batches),
                sum(int(batch.count(self.objective.unit)) for batch in batches),
            ],
            dtype=torch.int64,
            device=world.device(),
        )
        totals = collectives.sum_over_data_parallel(rows)
        return {name: int(total) for name, total in zip(("rows", "tokens", "units"), totals, strict=True)}

    def _training_batches(self) -> Iterator[list[TokenBatch]]:
        plan, done, epoch = self.plan, 0, 0
        while done < plan.max_steps:
            first = epoch * self.train.batches_per_epoch
            steps = min(plan.steps_per_epoch, plan.max_steps - done)
            yield from self.train.iterate(first, first + steps)
            done += steps
            epoch += 1
