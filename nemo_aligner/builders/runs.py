# SPDX-License-Identifier: Apache-2.0
"""From the settings of a run to its folder, its checkpoints and its end."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_aligner.builders.models import Pretrained
from nemo_aligner.checkpoint.training import (
    Checkpoint,
    TrainingCheckpoints,
    find_checkpoints,
    read_checkpoint,
    remove_unfinished,
)
from nemo_aligner.config.base import Job
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.learning_rate import OptimConfig
from nemo_aligner.parallel import collectives, world
from nemo_aligner.run.experiment import Experiment, ExperimentConfig

__all__ = ["open_experiment", "resume_point", "save_result", "training_checkpoints", "warn_of_schedule"]

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def open_experiment(job: Job) -> Iterator[Experiment]:
    """The run's folder, the same on every rank."""
    config: ExperimentConfig = job.exp_manager
    folder = collectives.broadcast_object(config.folder())
    if world.is_logging_rank():
        logger.info("results go to %s", folder)
    with Experiment(config, folder, writes=world.is_logging_rank()) as run:
        yield run


@world.phase("looking for a checkpoint")
def resume_point(job: Job, run: Experiment) -> Checkpoint | None:
    """The checkpoint that the run goes on from: its folder's newest, else the one that the settings name.

    What interrupted saves have left in the folder is removed.

    Raises:
        UserError: there is none, and the settings ask for one.
    """
    found: Checkpoint | UserError | None = None
    if world.is_logging_rank():
        try:
            found = _find(job, run)
        except UserError as error:
            found = error
    found = collectives.broadcast_object(found)
    if isinstance(found, UserError):
        raise found
    if found is not None and not job.exp_manager.create_checkpoint_callback:
        raise UserError(
            f"the run would go on from {found.path}, and exp_manager.create_checkpoint_callback=False",
            cure="set it to True, or exp_manager.explicit_log_dir to a new folder",
        )
    return found


def _find(job: Job, run: Experiment) -> Checkpoint | None:
    config = job.exp_manager
    remove_unfinished(run.checkpoints_folder)
    named = config.resume_from_checkpoint or job.model.resume_from_checkpoint
    if config.resume_if_exists and (own := find_checkpoints(run.checkpoints_folder)):
        return own[-1]
    if named:
        return read_checkpoint(Path(named))
    if config.resume_if_exists and not config.resume_ignore_no_checkpoint:
        raise UserError(
            f"there is no checkpoint in {run.checkpoints_folder}, and "
            "exp_manager.resume_ignore_no_checkpoint=False",
            cure="set exp_manager.resume_ignore_no_checkpoint=True to start anew",
        )
    return None


def training_checkpoints(
    job: Job, run: Experiment, pretrained: Pretrained[Any], *, keep_newest: int = 1
) -> TrainingCheckpoints | None:
    """Where the run saves, and how many of the newest stay beside the best; None where it is not to."""
    if not job.exp_manager.create_checkpoint_callback:
        return None
    return TrainingCheckpoints(
        run.checkpoints_folder,
        job.exp_manager.checkpoint_callback_params,
        pretrained.learner,
        model_config=pretrained.config,
        files=pretrained.files,
        keep_newest=keep_newest,
    )


def save_result(
    job: Job, run: Experiment, pretrained: Pretrained[Any], checkpoints: TrainingCheckpoints | None
) -> None:
    """Write the trained model, or the best one of the run, as a .nemo; an earlier end of the same run is replaced."""
    params = job.exp_manager.checkpoint_callback_params
    if params.save_best_model and checkpoints is not None:
        checkpoints.save_best(run.nemo_path)
    elif params.save_nemo_on_train_end:
        pretrained.save(run.nemo_path, overwrite=True)


def warn_of_schedule(optim: OptimConfig, *, max_steps: int) -> None:
    """Say so where a short run leaves the warm-up or the cosine without their steps."""
    sched = optim.sched
    if not world.is_logging_rank():
        return
    if sched.warmup_steps >= max_steps:
        logger.warning(
            "the learning rate does not reach model.optim.lr=%g: the run has %d steps; "
            "set model.optim.sched.warmup_steps, now %d, below that",
            *(optim.lr, max_steps, sched.warmup_steps),
        )
    elif sched.decays and sched.warmup_steps + sched.held_steps(max_steps) >= max_steps:
        logger.warning(
            "the learning rate goes to model.optim.sched.min_lr=%g right after the warm-up: "
            "warmup_steps=%d + constant_steps=%d leave none of the %d steps for the decay; "
            "set model.optim.sched.constant_steps=0",
            *(sched.min_lr, sched.warmup_steps, sched.held_steps(max_steps), max_steps),
        )
