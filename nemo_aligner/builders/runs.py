# SPDX-License-Identifier: Apache-2.0
"""From the settings of a run to its folder, its checkpoints and its end."""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_aligner.algorithms.samples import ValidationResponses
from nemo_aligner.algorithms.supervised import SupervisedData, SupervisedTrainer
from nemo_aligner.builders.adapters import save_adapters
from nemo_aligner.builders.models import Pretrained, require_tokenizer
from nemo_aligner.builders.next_steps import say_next
from nemo_aligner.checkpoint.nemo_archive import WEIGHTS_NAME
from nemo_aligner.checkpoint.peft import ADAPTERS_OF
from nemo_aligner.checkpoint.sharded import load_model
from nemo_aligner.checkpoint.training import Newest, TrainingCheckpoints
from nemo_aligner.config.base import TrainingJob
from nemo_aligner.config.pairs import PairJob
from nemo_aligner.config.ppo import ActorJob
from nemo_aligner.config.sft import TextJob
from nemo_aligner.models.gpt.learning_rate import OptimConfig
from nemo_aligner.models.sampling_config import SamplingConfig
from nemo_aligner.objectives.protocol import Objective
from nemo_aligner.parallel import collectives, world
from nemo_aligner.run.disk import report_if_full
from nemo_aligner.run.experiment import Experiment, ExperimentConfig
from nemo_aligner.run.lock import FolderLock
from nemo_aligner.run.schedule import SupervisedConfig

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def open_experiment(job: TrainingJob) -> Iterator[Experiment]:
    """The run's folder, the same on every rank, and no other run's meanwhile.

    Raises:
        UserError: another run holds the folder, an earlier one's results are in it, or it cannot be written.
    """
    config: ExperimentConfig = job.exp_manager
    folder = collectives.broadcast_object(config.folder())
    if world.is_logging_rank():
        logger.info("results go to %s", folder)
        config.check_folder()
    with (
        _held(config, folder) as lock,
        Experiment(config, folder, writes=world.is_logging_rank(), lock=lock) as run,
    ):
        yield run


@contextlib.contextmanager
def _held(config: ExperimentConfig, folder: Path) -> Iterator[FolderLock | None]:
    """Rank 0 holds the folder; it has it before any rank goes on."""
    lock = None
    if world.is_logging_rank():
        config.make_folder(folder)
        lock = FolderLock(folder, setting=config.folder_setting)
    # Each round is a collective, so that no rank waits in one for longer than it may.
    with report_if_full(folder, "the lock"):
        while not collectives.broadcast_object(lock.take() if lock else False):
            time.sleep(1.0)
    try:
        yield lock
    finally:
        if lock is not None:
            lock.give_back()


def training_checkpoints(
    job: TrainingJob, run: Experiment, pretrained: Pretrained[Any], *, keep: Newest = lambda _: []
) -> TrainingCheckpoints | None:
    """Where the run saves, and what it keeps beside the best and the newest; None where it is not to save."""
    if not job.exp_manager.create_checkpoint_callback:
        return None
    config = (
        {**pretrained.config, ADAPTERS_OF: job.pretrained[1]} if job.model.peft.lora else pretrained.config
    )
    return TrainingCheckpoints(
        run.checkpoints_folder,
        job.exp_manager.checkpoint_callback_params,
        pretrained.learner,
        model_config=config,
        files=pretrained.files,
        keep=keep,
        identity=run.identity,
    )


def supervised_trainer(
    job: TextJob | PairJob,
    run: Experiment,
    pretrained: Pretrained[Any],
    objective: Objective,
    data: SupervisedData,
) -> SupervisedTrainer:
    """Return a trainer that is ready to fit, its optimizer made."""
    checkpoints = training_checkpoints(job, run, pretrained)
    assert isinstance(job.loop, SupervisedConfig)
    if job.loop.val_responses:
        data = _with_responses(job, job.loop, pretrained, data)
    trainer = SupervisedTrainer(job.loop, pretrained.learner, objective, data, run, checkpoints)
    prepare_training(job, pretrained, max_steps=trainer.plan.max_steps)
    return trainer


def _with_responses(
    job: TextJob | PairJob, loop: SupervisedConfig, pretrained: Pretrained[Any], data: SupervisedData
) -> SupervisedData:
    responses = ValidationResponses(
        policy=pretrained.learner,
        rows=data.validation["validation"].dataset,
        count=loop.val_responses,
        sampling=SamplingConfig(use_greedy=True, max_length=loop.val_response_length),
        end_ids=pretrained.learner.end_ids,
        decode=require_tokenizer(job, pretrained).decode,
    )
    return replace(data, responses=responses)


def prepare_training(
    job: TextJob | PairJob | ActorJob, pretrained: Pretrained[Any], *, max_steps: int
) -> None:
    """Make the optimizer of a run of ``max_steps`` optimizer steps."""
    assert job.loop is not None
    _warn_of_schedule(job.model.optim, max_steps=max_steps)
    pretrained.learner.prepare_training(
        job.model.optim, clip_grad=job.loop.gradient_clip_val, max_steps=max_steps
    )


def save_result(
    job: TrainingJob, run: Experiment, pretrained: Pretrained[Any], checkpoints: TrainingCheckpoints | None
) -> None:
    """Write the trained model, or the best one of the run, as a .nemo, and say what can be done with it.

    What an earlier end of the same run has written is replaced.
    """
    params, lora = job.exp_manager.checkpoint_callback_params, job.model.peft.lora
    ranked = checkpoints if params.save_best_model else None
    if ranked and lora:
        load_model(pretrained.learner.model, ranked.best().path / WEIGHTS_NAME)
    if lora and (ranked or params.save_nemo_on_train_end):
        # First, as a run whose .nemo is there counts as finished.
        save_adapters(job, pretrained.learner.model, pretrained.config, run.adapters_path)
    if ranked and not lora:
        ranked.save_best(run.nemo_path)
    elif ranked or params.save_nemo_on_train_end:
        pretrained.save(run.nemo_path, overwrite=True)
    say_next(job, run)


def _warn_of_schedule(optim: OptimConfig, *, max_steps: int) -> None:
    """Say so where a short run leaves the warm-up or the cosine without their steps."""
    sched, (warmup, held, _) = optim.sched, optim.sched.in_steps(max_steps)
    if not world.is_logging_rank():
        return
    if warmup >= max_steps:
        logger.warning(
            "the learning rate does not reach model.optim.lr=%g: the run has %d steps; "
            "set model.optim.sched.warmup_steps, now %d, below that",
            *(optim.lr, max_steps, warmup),
        )
    elif sched.decays and warmup + held >= max_steps:
        logger.warning(
            "the learning rate goes to model.optim.sched.min_lr=%g right after the warm-up: "
            "warmup_steps=%d + constant_steps=%d leave none of the %d steps for the decay; "
            "set model.optim.sched.constant_steps=0",
            *(sched.lowest(optim.lr), warmup, held, max_steps),
        )
