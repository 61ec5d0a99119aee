# SPDX-License-Identifier: Apache-2.0
"""A critic that serves an actor and is trained by its requests. Sees the model through its interface only."""

import logging
import math
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace

from torch import Tensor

from nemo_aligner.algorithms.served import score, serve
from nemo_aligner.algorithms.skips import Diverged, counted, too_many
from nemo_aligner.batch import TokenBatch
from nemo_aligner.checkpoint.trainer_state import Checkpoint, TrainerState, find_checkpoints
from nemo_aligner.checkpoint.training import TrainingCheckpoints
from nemo_aligner.errors import UserError
from nemo_aligner.models.alignable_interface import CriticModelInterface
from nemo_aligner.objectives.protocol import Objective
from nemo_aligner.parallel import collectives, world
from nemo_aligner.rollout_batch import ValueBatch
from nemo_aligner.run.experiment import Experiment
from nemo_aligner.run.metrics import means
from nemo_aligner.run.stop import SAVED_CODE, StoppedEarly, StopRequest, TimeLimit
from nemo_aligner.run.stopwatch import Stopwatch
from nemo_aligner.serving.protocol import Health, Limits, RequestVersion, Scalar
from nemo_aligner.serving.request_queue import ServedScores
from nemo_aligner.serving.server import Server

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CriticServerConfig:
    """Sizes and habits of a critic's job."""

    name: str  # of the model, for clients
    limits: Limits
    global_batch_size: int  # rows of an optimizer step
    micro_batch_size: int  # rows of a forward and backward pass on one rank
    inference_rows: int  # rows of a forward pass on one data parallel rank
    length_multiple: int  # of positions that rows are padded to
    gives_rewards: bool  # for the reward model beside it
    offload_optimizer: bool  # to CPU memory while it scores
    max_skipped_steps: int  # optimizer steps in a row, not finite, after which the job ends
    actor_timeout: float | None  # seconds without a word from the actor after which the job saves and ends
    settings: Mapping[str, Scalar]  # for the actor to compare with its own


@dataclass(frozen=True, kw_only=True)
class CriticState:
    """The state that a critic resumes from, beside its weights."""

    run_id: str = ""  # of the actor that it learns from
    sequence: int = 0  # train requests of that run that it has learned from
    last_loss: float | None = None  # the reply to the last of them
    is_half: bool = True  # whether the actor has a checkpoint of the same moment, or is about to


def newest_halves(found: list[Checkpoint]) -> list[Checkpoint]:
    """Return what is kept for the actor: until it has saved too, its pair is the one before the newest."""
    return [one for one in found if one.algorithm(CriticState).is_half][-2:]


class CriticServerTrainer:
    """Serves and trains ``model`` on ``objective``.

    Args:
        checkpoints: where it saves; None: nowhere.
        load: puts the model where a checkpoint has it, or at the beginning; called on every rank.
        start: the checkpoint that the model is at; None: the beginning.
    """

    def __init__(
        self,
        config: CriticServerConfig,
        model: CriticModelInterface,
        objective: Objective,
        run: Experiment,
        checkpoints: TrainingCheckpoints | None,
        *,
        load: Callable[[Checkpoint | None], None],
        start: Checkpoint | None,
    ) -> None:
        self.config, self.model, self.objective, self.run = config, model, objective, run
        self.checkpoints, self._load = checkpoints, load
        self._go_to(start)
        self._saved_step = self.state.step
        self._start, self._is_back = start, False
        self._limit = TimeLimit(run.config.max_seconds)
        self._watch = Stopwatch()  # since the last optimizer step

    def run_server(self, open_server: Callable[[], AbstractContextManager[Server]]) -> None:
        """Serve the actor until it ends the run, a signal comes, or it is silent for too long. Called by every rank.

        Raises:
            StoppedEarly: a signal or the actor's silence ended it; what was learned is saved.
            UserError: losses or gradients are no longer finite.
        """
        self.run.begin(self.state.step)
        silence, up = 0.0, False

        def should_stop(server: Server) -> bool:
            nonlocal silence, up
            silence = server.silent_seconds if self.own.last_loss is not None else 0.0
            timeout, up = self.config.actor_timeout, self._limit.is_up
            return request.number != 0 or up or (timeout is not None and silence > timeout)

        with StopRequest() as request:
            try:
                asked = serve(self, open_server, should_stop=should_stop)
            except Diverged as end:
                raise end.error from end
            if self.checkpoints is not None and self.state.step > self._saved_step:
                self.save(None)
            number, up, silence = collectives.broadcast_object((request.number, up, silence))
        if asked:
            return
        silent = "exp_manager.max_time_per_run" if up else f"the actor was not heard for {silence:.0f} s"
        reason = signal.Signals(number).name if number else silent
        saved = "nothing is saved" if self.checkpoints is None else "the same command goes on from there"
        raise StoppedEarly(
            f"stopped after step {self.state.step}: {reason}; {saved}",
            reason=reason,
            exit_code=0 if up and not number else SAVED_CODE if self.checkpoints else 1,
        )

    def infer(self, batch: TokenBatch) -> ServedScores:
        """See Handler."""

        def ask(mine: TokenBatch, micro: int) -> tuple[Tensor | None, Tensor | None]:
            if self.config.gives_rewards:
                return self.model.infer_rm_critic(mine, micro_batch_size=micro)
            return None, self.model.values(mine, micro_batch_size=micro)

        with world.phase("scoring"), self._watch("infer_time"):
            if self.config.offload_optimizer:
                self.model.offload_optimizer()
            return score(batch, ask, rows=self.config.inference_rows, multiple=self.config.length_multiple)

    def train(self, batch: ValueBatch, version: RequestVersion | None) -> float:
        """See Learner: a global batch at a time; the mean loss of the steps that were not skipped.

        Raises:
            Diverged: too many steps in a row were skipped.
        """
        self._forget_what_is_over()
        size, began = self.config.global_batch_size, time.perf_counter()
        parts = batch.pad_rows(-(-batch.num_rows // size) * size).split(size)
        losses = [self._step(part) for part in parts]
        finite = [loss for loss in losses if math.isfinite(loss)]
        mean = sum(finite) / len(finite) if finite else math.nan
        self._limit.note("step", time.perf_counter() - began)
        self.state = replace(self.state, consumed_samples=self.state.consumed_samples + batch.num_rows)
        self.own = replace(self.own, last_loss=mean)
        if version is not None:
            self.own = replace(self.own, run_id=version.run_id, sequence=version.sequence)
        if world.is_logging_rank():
            source = f" of the actor's step {version.step}" if version else ""
            logger.info(
                "trained on %d responses%s: loss %.4f, step %d", batch.num_rows, source, mean, self.state.step
            )
        return mean

    def _step(self, batch: ValueBatch) -> float:
        """One optimizer step on a global batch that every rank has."""
        started, step = time.perf_counter(), self.state.step + 1
        multiple, ranks = self.config.length_multiple, world.dp_size()
        longest = int(batch.lengths.max())
        share = batch.num_rows // ranks
        mine = batch.with_length(-(-longest // multiple) * multiple).take(
            slice(world.dp_rank() * share, (world.dp_rank() + 1) * share)
        )
        with world.phase(f"step {step}"):
            micro_batches = mine.split(self.config.micro_batch_size)
            metrics = means(
                self.model.get_loss_and_metrics(micro_batches, self.objective, forward_only=False)
            )
            metrics |= self.model.optimizer_step()
        world.synchronize()
        metrics["step_time"] = time.perf_counter() - started
        self.state = replace(self.state, step=step)
        timers, self._watch = self._watch.seconds, Stopwatch()
        logged = {f"train/{name}": value for name, value in metrics.items()}
        self.run.log(logged | {f"timers/{name}": seconds for name, seconds in timers.items()}, step=step)
        self.state = counted(self.state, metrics, step=step)
        limit = self.config.max_skipped_steps
        if (error := too_many(self.state, block="trainer.ppo", limit=limit)) is not None:
            raise Diverged(error)
        return metrics["loss"]

    def save(self, version: RequestVersion | None) -> None:
        """See Handler."""
        if self.checkpoints is None:
            raise UserError(
                "this critic saves nothing: exp_manager.create_checkpoint_callback=False",
                fix="set it to True in the critic's job, or to False in the actor's",
            )
        began = time.perf_counter()
        self._forget_what_is_over()
        if version is not None:
            # What was saved of this step for no actor may be pruned any time; it makes room for the half of a pair.
            step = self.state.step
            self.checkpoints.discard(
                lambda one: one.state.step == step and not one.algorithm(CriticState).is_half
            )
        if not self.checkpoints.holds(self.state.step):
            own = replace(self.own, is_half=version is not None)
            self.checkpoints.save(replace(self.state, algorithm=asdict(own)), steps_per_epoch=1)
            self.checkpoints.finish()
        self._saved_step = self.state.step
        self._limit.note("save", time.perf_counter() - began)

    def roll_back(self, version: RequestVersion) -> None:
        """See Handler."""
        checkpoint = self._saved_at(version)
        try:
            self._load(checkpoint)
        except UserError as error:
            # Half of it may be loaded: nothing may be computed with that.
            raise RuntimeError(f"going back failed: {error}") from error
        self._go_to(checkpoint)
        self._saved_step = self.state.step
        self._is_back = True
        self.run.begin(self.state.step)

    def _go_to(self, checkpoint: Checkpoint | None) -> None:
        self.state = checkpoint.state if checkpoint else TrainerState()
        self.own = checkpoint.algorithm(CriticState) if checkpoint else CriticState()

    def _forget_what_is_over(self) -> None:
        """Once the run goes on from where it went back to: remove the checkpoints of what it does again."""
        if self._is_back and self.checkpoints is not None:
            self.checkpoints.discard(lambda one: one.state.step > self._saved_step)
        self._is_back = False

    def _saved_at(self, version: RequestVersion) -> Checkpoint | None:
        """The newest checkpoint that is trained on no more than the request's version says; None: the beginning.

        What it lacks, the actor sends again.
        """
        found: list[Checkpoint] = []
        if world.is_logging_rank() and self.checkpoints is not None:
            found = find_checkpoints(self.checkpoints.folder)
        found = collectives.broadcast_object(found)
        if self._start is not None:
            found.append(self._start)
        states = [(one.algorithm(CriticState), one) for one in found]
        own = [(state.sequence, one) for state, one in states if state.run_id == version.run_id]
        early = [pair for pair in own if pair[0] <= version.sequence]
        return max(early, key=lambda pair: pair[0], default=(0, None))[1]

    def health(self) -> Health:
        """See Handler."""
        limits = self.config.limits
        return Health(
            model=self.config.name,
            step=self.state.step,
            vocab_size=limits.vocab_size,
            seq_length=limits.seq_length,
            settings=self.config.settings,
            run_id=self.own.run_id,
            sequence=self.own.sequence,
            last_loss=self.own.last_loss,
        )
