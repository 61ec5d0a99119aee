# SPDX-License-Identifier: Apache-2.0
"""The supervised loop: batches in, an objective, steps, validation. Sees the model through its interface only."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from nemo_aligner.algorithms.run_lifecycle import RunLifecycle
from nemo_aligner.algorithms.samples import ValidationResponses
from nemo_aligner.algorithms.skips import counted
from nemo_aligner.batch import TokenBatch
from nemo_aligner.checkpoint.trainer_state import Checkpoint, TrainerState
from nemo_aligner.checkpoint.training import TrainingCheckpoints, monitor_name
from nemo_aligner.data.loader import BatchLoader
from nemo_aligner.models.alignable_interface import SupervisedInterface
from nemo_aligner.objectives.protocol import Objective, Sums
from nemo_aligner.parallel import collectives, world
from nemo_aligner.run.experiment import Experiment
from nemo_aligner.run.metrics import added, means
from nemo_aligner.run.progress import ProgressBar
from nemo_aligner.run.schedule import SupervisedConfig, limited, make_plan
from nemo_aligner.run.stop import StopRequest

logger = logging.getLogger(__name__)

Batches = BatchLoader[TokenBatch]
Annotate = Callable[[Sequence[TokenBatch]], Sequence[TokenBatch]]


@dataclass(frozen=True, kw_only=True)
class SupervisedData:
    """The batches of a run: to train on, to validate on, and what is put on both."""

    train: Batches
    # sets by the prefix of their metrics; the one called "validation" ranks checkpoints
    validation: Mapping[str, Batches]
    annotate: Annotate = list  # puts on batches, without gradients, what the loss needs from another model
    # called on every rank with the number of each step, from 1
    before_step: Callable[[int], None] = lambda _: None
    # of validation's batches, as they are; None: the training's, annotated
    validated: Objective | None = None
    responses: ValidationResponses | None = None  # that are generated after each validation


@dataclass(frozen=True, kw_only=True)
class SupervisedState:
    """The state that a supervised loop resumes from, beside its weights."""

    unvalidated_step: int | None = None  # whose validation a signal has ended, or 0 before the first step


class SupervisedTrainer:
    """Trains ``model`` on ``objective`` (supervised fine-tuning, reward models, DPO, KTO, SPIN, distillation).

    Args:
        checkpoints: where to save while training; None: nowhere.
    """

    def __init__(
        self,
        config: SupervisedConfig,
        model: SupervisedInterface,
        objective: Objective,
        data: SupervisedData,
        run: Experiment,
        checkpoints: TrainingCheckpoints | None = None,
    ) -> None:
        self.config, self.model, self.objective = config, model, objective
        self.data, self.run = data, run
        # The learning-rate schedule is as long as this says.
        self.plan = make_plan(
            config,
            batches_per_epoch=data.train.batches_per_epoch,
            # Whether anything is validated; each set has a count of its own.
            val_batches=max((batches.batches_per_epoch for batches in data.validation.values()), default=0),
            limit_train=config.limit_train_batches,
            limit_val=config.limit_val_batches,
        )
        self.checkpoints = checkpoints
        self.lifecycle = RunLifecycle(self.plan, run, checkpoints, block=config.block, save=self._save)
        self.state = TrainerState(
            data=data.train.fingerprint | {"steps_per_epoch": self.plan.steps_per_epoch}
        )
        self.own = SupervisedState()

    def fit(self, start: Checkpoint | None = None) -> None:
        """Train to the end of the plan, resuming from ``start`` if it is given.

        Raises:
            StoppedEarly: a signal or the time limit ended the run between two steps; it is saved.
            UserError: ``start`` is at the end of the plan, or its run had other batches; or losses or gradients are no
                longer finite.
        """
        if start is not None:
            self.state = self.lifecycle.restore(start, self.state.data)
            self.own = start.algorithm(SupervisedState)
        elif self.config.val_before_train:
            self.own = SupervisedState(unvalidated_step=0)
        self.lifecycle.check_room()
        self.run.begin(self.state.step, max_steps=self.plan.max_steps)
        bar = ProgressBar(total=self.plan.max_steps, start=self.state.step, enabled=world.is_logging_rank())
        try:
            with StopRequest(interrupts=True, logs=world.is_logging_rank()) as self._request:
                if self.own.unvalidated_step == self.state.step:
                    self._catch_up()
                for batches in self._training_batches():
                    self._advance(batches, bar)
                    self.lifecycle.after(self.state.step, self._request)
                self.lifecycle.end(self.state)
        finally:
            bar.close()
        self._report_truncated()

    def _advance(self, batches: Sequence[TokenBatch], bar: ProgressBar) -> None:
        """One step, and validation where it is due."""
        step = self.state.step + 1
        with world.phase(f"step {step}"):
            metrics = self._step(batches)
        self.lifecycle.limit.note("step", metrics["step_time"])
        consumed = self.state.consumed_samples + int(metrics.pop("samples"))
        self.state = replace(self.state, step=step, consumed_samples=consumed)
        metrics |= {"consumed_samples": consumed, "epoch": 1 + (step - 1) // self.plan.steps_per_epoch}
        self.run.log({f"train/{name}": value for name, value in metrics.items()}, step=step)
        bar.update(step, metrics)
        self.state = counted(self.state, metrics, step=step)
        self.lifecycle.stop_if_diverged(self.state, limit=self.config.max_skipped_steps)
        if self.plan.validates_after(step):
            self._validate_after(step)

    def _catch_up(self) -> None:
        """Run the validation that is due before the next step; the step before it is already saved."""
        step = self.state.step
        if not self.plan.validates_after(step):
            self.own = SupervisedState()
            return
        self._validate_after(step)
        if self.own.unvalidated_step == step:
            (number,) = collectives.all_reduce_max([self._request.number])
            raise self.lifecycle.stopped(step, int(number))

    def _validate_after(self, step: int) -> None:
        """Validate and log the means. A signal interrupts it; the next start repeats it."""
        with world.phase(f"validation after step {step}"):
            means = self._validate(lambda: self._request.number)
        self.own = SupervisedState(unvalidated_step=step if means is None else None)
        if means is None:
            return
        self.run.log(means, step=step)
        seconds = sum(means[name] for name in means if name.endswith("/step_time"))
        self.lifecycle.limit.note("validation", seconds)
        known = {monitor_name(name): value for name, value in means.items() if name.startswith("validation/")}
        metrics = {name: value for name, value in known.items() if name != "val_step_time"}
        self.state = replace(self.state, metrics=metrics)
        if self.data.responses is not None:
            self.data.responses.write(self.run, step=step)

    def _save(self, checkpoints: TrainingCheckpoints) -> None:
        state = replace(self.state, algorithm=asdict(self.own))
        checkpoints.save(state, steps_per_epoch=self.plan.steps_per_epoch)

    def _report_truncated(self) -> None:
        counts = torch.tensor(
            [self.data.train.num_truncated, self.data.train.num_seen], device=world.device()
        )
        truncated, seen = (int(count) for count in collectives.sum_over_data_parallel(counts))
        if truncated and world.is_logging_rank():
            logger.warning(
                "%d of %d training samples were too long and were cut: raise model.data.train_ds.max_seq_length "
                "(and model.encoder_seq_length, if it is lower), or shorten them",
                truncated,
                seen,
            )

    def validate(self) -> dict[str, float]:
        """Means over every unit of the validation data: "validation/loss" and its kin, and of further sets."""
        means = self._validate(lambda: 0)
        assert means is not None
        return means

    def _validate(self, asked: Callable[[], int]) -> dict[str, float] | None:
        """See :meth:`validate`; None where ``asked`` is not 0 on some rank before the end."""
        means: dict[str, float] = {}
        for name, batches in self.data.validation.items():
            found = self._means_over(name, batches, asked)
            if found is None:
                return None
            means |= found
        return means

    def _means_over(self, name: str, source: Batches, asked: Callable[[], int]) -> dict[str, float] | None:
        started, count = time.perf_counter(), limited(source.batches_per_epoch, self.config.limit_val_batches)
        sums: Sums = {}
        for batches in source.iterate(0, count):
            (stops,) = collectives.all_reduce_max([asked()])
            if stops:
                return None
            batches = batches if self.data.validated else self.data.annotate(batches)
            objective = self.data.validated or self.objective
            sums = added(sums, self.model.get_loss_and_metrics(batches, objective, forward_only=True))
        whole = means(sums)
        if world.is_logging_rank():
            accuracy = f"  accuracy {whole['acc']:.3f}" if "acc" in whole else ""
            logger.info("%s loss %.4f%s", name, whole["loss"], accuracy)
        return {f"{name}/{metric}": value for metric, value in whole.items()} | {
            f"{name}/step_time": time.perf_counter() - started
        }

    def _step(self, batches: Sequence[TokenBatch]) -> dict[str, float]:
        started = time.perf_counter()
        self.data.before_step(self.state.step + 1)
        batches = self.data.annotate(batches)
        metrics = means(self.model.get_loss_and_metrics(batches, self.objective, forward_only=False))
        metrics |= self.model.optimizer_step()
        world.synchronize()
        counts = self._count(batches)
        seconds = time.perf_counter() - started
        return {
            **metrics,
            "step_time": seconds,
            "tokens_per_s": counts["tokens"] / seconds,
            "learned_tokens": counts["learned_tokens"],
            "samples": counts["samples"],
        }

    def _count(self, batches: Sequence[TokenBatch]) -> dict[str, int]:
        """Samples, tokens and loss tokens of the global batch; padding rows are not counted."""
        rows = torch.tensor(
            [
                sum(int(batch.real_sequences().sum()) // batch.sequences_per_row for batch in batches),
                sum(int(batch.lengths[batch.real_sequences()].sum()) for batch in batches),
                sum(int(batch.loss_tokens().sum()) for batch in batches),
            ],
            dtype=torch.int64,
            device=world.device(),
        )
        totals = collectives.sum_over_data_parallel(rows)
        return {
            name: int(total)
            for name, total in zip(("samples", "tokens", "learned_tokens"), totals, strict=True)
        }

    def _training_batches(self) -> Iterator[list[TokenBatch]]:
        """Global batches from the step that is reached on, epoch by epoch."""
        plan = self.plan
        done = self.state.step
        while done < plan.max_steps:
            epoch, within = divmod(done, plan.steps_per_epoch)
            first = epoch * self.data.train.batches_per_epoch + within
            steps = min(plan.steps_per_epoch - within, plan.max_steps - done)
            yield from self.data.train.iterate(first, first + steps)
            done += steps
