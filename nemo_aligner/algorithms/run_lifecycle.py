# SPDX-License-Identifier: Apache-2.0
"""The work between two steps of any loop: checkpoints, signals, the time limit; and where a loop resumes."""

import logging
import signal
import time
from collections.abc import Callable
from dataclasses import replace

from nemo_aligner.algorithms.skips import refuse_to_end, too_many
from nemo_aligner.checkpoint.trainer_state import Checkpoint, TrainerState
from nemo_aligner.checkpoint.training import TrainingCheckpoints
from nemo_aligner.errors import UserError
from nemo_aligner.parallel import collectives, world
from nemo_aligner.run.experiment import Experiment
from nemo_aligner.run.schedule import Plan
from nemo_aligner.run.stop import StoppedEarly, StopRequest, TimeLimit, saved_code

logger = logging.getLogger(__name__)


class RunLifecycle:
    """Saves where it is due, and ends a run where it is asked to.

    Args:
        block: where the loop's settings stand, as in "trainer.sft".
        checkpoints: where to save; None: nowhere.
        save: begins a checkpoint of the state that the loop is in.
    """

    def __init__(
        self,
        plan: Plan,
        run: Experiment,
        checkpoints: TrainingCheckpoints | None,
        *,
        block: str,
        save: Callable[[TrainingCheckpoints], None],
    ) -> None:
        self.plan, self.run, self.checkpoints, self._block, self._save = plan, run, checkpoints, block, save
        self.limit = TimeLimit(run.config.max_seconds)
        if world.is_logging_rank():
            passes = plan.max_steps / plan.steps_per_epoch
            logger.info(
                "steps of the run: %d, passes over the data: %.4g (%s)",
                *(plan.max_steps, passes, plan.set_by),
            )

    def restore(self, start: Checkpoint, data: dict[str, object]) -> TrainerState:
        """Put what is trained where ``start`` has it; the loop's state there.

        Args:
            data: what makes up the loop's batches.

        Raises:
            UserError: ``start`` is at the end of the plan, or its run had other batches.
        """
        changed = {
            name: (value, data.get(name))
            for name, value in start.state.data.items()
            if value != data.get(name)
        }
        if changed:
            self._refuse_other_batches(start, changed)
        step, last = start.state.step, self.plan.max_steps
        if step >= last and self.run.nemo_path.exists():
            raise UserError(
                f"the run in {self.run.folder} is finished: {step} of {last} steps are done",
                fix=f"to go on, set {self._further} higher; for another run, "
                "set exp_manager.explicit_log_dir to a new folder",
            )
        assert self.checkpoints is not None
        self.checkpoints.restore(start)
        if world.is_logging_rank():
            logger.info("resumed after step %d of %d", step, last)
        return replace(start.state, data=data)

    @property
    def _further(self) -> str:
        """The setting that makes the run as long as it is."""
        setting, given, _ = self.plan.set_by.partition("=")
        return setting if given else f"{self._block}.max_steps (or {self._block}.max_epochs)"

    def _refuse_other_batches(self, start: Checkpoint, changed: dict[str, tuple[object, object]]) -> None:
        listed = ", ".join(f"{name} was {old} and is {new}" for name, (old, new) in changed.items())
        if not self.run.config.resume_with_changes:
            raise UserError(
                f"{start.path} was trained on other batches: {listed}",
                fix="give the run's own data and batch size; or set exp_manager.resume_with_changes=True to go on "
                "with these; or start a new run in another exp_manager.explicit_log_dir, from this checkpoint",
            )
        if world.is_logging_rank():
            logger.warning(
                "exp_manager.resume_with_changes=True: the run goes on with other batches: %s", listed
            )

    def check_room(self) -> None:
        """Raise UserError if the disk has no room for a checkpoint.

        Raises:
            UserError: the disk has less than one takes.
        """
        if self.checkpoints is not None:
            self.checkpoints.check_room()

    def after(self, step: int, request: StopRequest) -> None:
        """Once ``step`` steps are done: save where it is due; end where any rank was asked to, or time is up.

        Raises:
            StoppedEarly: the run ends here; it is saved.
        """
        writing = self.checkpoints is not None and self.checkpoints.is_writing
        ends = step == self.plan.max_steps
        with world.phase(f"step {step}, whether to go on"):
            lost = self.run.lost_to is not None
            number, up, writing, lost = collectives.all_reduce_max(
                [request.number, self.limit.is_up, writing, lost]
            )
        if lost:
            raise self._folder_is_lost(step)
        if self.checkpoints is not None:
            if not writing:
                self.checkpoints.finish()
            if ends or number or up or self.plan.saves_after(step):
                self.save(wait=bool(ends or number or up))
        if not ends and (number or up):
            raise self.stopped(step, int(number))

    def stop_if_diverged(self, state: TrainerState, *, limit: int) -> None:
        """Save and end a run that has skipped ``limit`` steps in a row: its weights are those of the step before them.

        Raises:
            UserError: it has.
        """
        if (error := too_many(state, block=self._block, limit=limit)) is None:
            return
        try:
            self.save(wait=True)
        except UserError as broken:
            raise UserError(f"{error.problem}; {broken.problem}", fix=error.fix) from broken
        raise error

    def end(self, state: TrainerState) -> None:
        """Once all steps are done: wait for a save in the background.

        Raises:
            UserError: the last steps were skipped, so that the weights are not those of the end.
        """
        if self.checkpoints is not None:
            self.checkpoints.finish()
        refuse_to_end(state)

    def _folder_is_lost(self, step: int) -> UserError:
        """This run was suspended for so long that another one took its folder for free."""
        other = self.run.lost_to or "rank 0 knows which"
        return UserError(
            f"{self.run.folder} was taken over by another run ({other}); this one ends after step {step} and writes "
            "nothing more",
            fix="let the other run go on, or stop it and start this one again",
        )

    def save(self, *, wait: bool) -> None:
        """Save now."""
        if self.checkpoints is None:
            return
        started = time.perf_counter()
        self._save(self.checkpoints)
        if wait:
            self.checkpoints.finish()
        self.limit.note("save", time.perf_counter() - started)

    def stopped(self, step: int, number: int) -> StoppedEarly:
        """The end by signal ``number``, or by the time limit where that is 0, after ``step`` steps."""
        reason = signal.Signals(number).name if number else "exp_manager.max_time_per_run"
        if self.checkpoints is None:
            return StoppedEarly(
                f"stopped after step {step} by {reason}; nothing is saved: "
                "exp_manager.create_checkpoint_callback=False",
                reason=reason,
                exit_code=128 + number if number else 0,
            )
        identity = self.run.identity
        command = f": {identity.command}" if number == signal.SIGINT and identity else ""
        return StoppedEarly(
            f"stopped after step {step} of {self.plan.max_steps} by {reason}; the same command goes on from there"
            + command,
            reason=reason,
            exit_code=saved_code(number),
        )
