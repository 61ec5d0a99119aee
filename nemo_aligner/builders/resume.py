# SPDX-License-Identifier: Apache-2.0
"""From a run's folder and settings to the checkpoint that it goes on from, whole and of the same run."""

import logging
from pathlib import Path

from nemo_aligner.builders.models import chosen_precision
from nemo_aligner.checkpoint.digests import damage_text
from nemo_aligner.checkpoint.model_digest import model_digest
from nemo_aligner.checkpoint.model_nemo import damage_over_ranks
from nemo_aligner.checkpoint.peft import peft_digest
from nemo_aligner.checkpoint.sources import find_model
from nemo_aligner.checkpoint.trainer_state import (
    Checkpoint,
    find_checkpoints,
    read_checkpoint,
    scan_checkpoints,
)
from nemo_aligner.checkpoint.training import remove_unfinished, set_aside
from nemo_aligner.config.base import TrainingJob
from nemo_aligner.config.resume import changes, plain
from nemo_aligner.errors import UserError
from nemo_aligner.parallel import collectives, world
from nemo_aligner.run.experiment import Experiment
from nemo_aligner.run.identity import RunIdentity, asked_keys, read_settings
from nemo_aligner.run.progress import heartbeat

logger = logging.getLogger(__name__)


@world.phase("looking for a checkpoint")
def resume_point(job: TrainingJob, run: Experiment) -> Checkpoint | None:
    """The checkpoint that the run goes on from: its folder's newest, else the one that the settings name.

    What interrupted saves have left in the folder is removed. From here on the folder is this run's: ``run.identity``
    is known on rank 0, and its files are written.

    Raises:
        UserError: there is none, and the settings ask for one; it is damaged; or it is another run's.
    """
    start = _whole(job, run)
    collectives.from_rank_0(lambda: _accept(job, run, start))
    return start


def _whole(job: TrainingJob, run: Experiment) -> Checkpoint | None:
    """The checkpoint to go on from, once its files are known to be as they were written."""
    start = collectives.from_rank_0(lambda: _find(job, run))
    if start is None or not (damage := _damage(start)):
        return start
    beside = collectives.from_rank_0(lambda: find_checkpoints(start.path.parent))
    before = (one for one in reversed(beside) if one.state.step < start.state.step)
    older = next((one for one in before if not _damage(one)), None)
    collectives.from_rank_0(lambda: _go_back(job, run, start, damage, older))
    return older


def _damage(checkpoint: Checkpoint) -> list[str] | None:
    with heartbeat(f"checking the files of {checkpoint.path}", enabled=world.is_logging_rank()):
        damage = damage_over_ranks(checkpoint.path)
    if damage is None and world.is_logging_rank():
        logger.info("%s was written without digests: its files are not checked", checkpoint.path)
    return damage


def _go_back(
    job: TrainingJob, run: Experiment, start: Checkpoint, damage: list[str], older: Checkpoint | None
) -> None:
    """Go on from ``older`` instead of ``start``, where the settings say so."""
    is_own = start.path.parent == run.checkpoints_folder.resolve()
    problem = f"{start.path} is damaged: {damage_text(damage)}"
    if older is None:
        raise UserError(
            f"{problem}; no older checkpoint beside it is whole",
            fix=f"put the files back from a copy, or start a new run in another {job.exp_manager.folder_setting}",
        )
    if is_own and job.exp_manager.resume_from_older_if_damaged:
        logger.warning("%s", problem)
        set_aside(start.path, newest=older.path)
        return
    key = "resume_from_older_if_damaged=True" if is_own else f"resume_from_checkpoint={older.path}"
    raise UserError(
        f"{problem}; the newest whole checkpoint before it is {older.path}, after step {older.state.step}",
        fix=f"set exp_manager.{key} to go on from there"
        + (", and have the damaged one set aside" if is_own else ""),
    )


def _find(job: TrainingJob, run: Experiment) -> Checkpoint | None:
    config = job.exp_manager
    remove_unfinished(run.checkpoints_folder)
    named = config.resume_from_checkpoint or job.model.resume_from_checkpoint
    if config.resume_if_exists and (own := _readable(job, run)):
        return own[-1]
    if named:
        return read_checkpoint(Path(named))
    if config.resume_if_exists and not config.resume_ignore_no_checkpoint:
        raise UserError(
            f"there is no checkpoint in {run.checkpoints_folder}, and "
            "exp_manager.resume_ignore_no_checkpoint=False",
            fix="set exp_manager.resume_ignore_no_checkpoint=True to start anew",
        )
    return None


def _readable(job: TrainingJob, run: Experiment) -> list[Checkpoint]:
    """The run's checkpoints, oldest first; those of an unknown step are refused, or set aside."""
    found, unreadable = scan_checkpoints(run.checkpoints_folder)
    for path, error in unreadable.items():
        if not found:
            raise error
        newest = found[-1]
        if not job.exp_manager.resume_from_older_if_damaged:
            raise UserError(
                f"{error.problem}; the newest checkpoint beside it is {newest.path}, after step {newest.state.step}",
                fix="set exp_manager.resume_from_older_if_damaged=True to go on from there, and have the damaged one "
                f"set aside; or {error.fix}",
            )
        logger.warning("%s", error.problem)
        set_aside(path, newest=newest.path)
    return found


def _accept(job: TrainingJob, run: Experiment, start: Checkpoint | None) -> None:
    """Make the folder this run's, if ``start`` is."""
    if start is not None and not job.exp_manager.create_checkpoint_callback:
        raise UserError(
            f"the run would go on from {start.path}, and exp_manager.create_checkpoint_callback=False",
            fix="set it to True, or exp_manager.explicit_log_dir to a new folder",
        )
    settings = plain(job)
    settings["trainer"]["precision"] = chosen_precision(job)
    identity = RunIdentity(settings=settings, base_model=_start_digest(job))
    if start is not None:
        _compare(job, start, identity)
    run.start(identity)


def _start_digest(job: TrainingJob) -> str:
    """By which the model that a run begins with is known again, the adapters that it is given included."""
    base, adapters = quick_digest(job.pretrained[1]), job.model.peft.restore_from_path
    return f"{base}+{peft_digest(Path(adapters))}" if base and adapters else base


def quick_digest(named: str) -> str:
    """By which the model that a setting names is known again; "" where there is none."""
    try:
        base = find_model(named)
        return model_digest(base) if base.exists() else ""
    except UserError:
        return ""  # there is no model, as its loader will say


def _compare(job: TrainingJob, start: Checkpoint, identity: RunIdentity) -> None:
    """List what is another setting than it was when ``start`` was written; refuse what makes it another run."""
    before, (key, base) = read_settings(start.path), job.pretrained
    found = (
        [] if before is None else changes(before, identity.settings, asked=asked_keys(), own=job.resume_rules)
    )
    if before is None:
        logger.info("%s was written without its settings: what has changed since is not known", start.path)
    for change in found:
        logger.log(logging.INFO if change.effect == "free" else logging.WARNING, "%s", change)
    refused = [str(change) for change in found if change.is_refused]
    if start.state.base_model and identity.base_model not in ("", start.state.base_model):
        adapters = job.model.peft.restore_from_path
        beside = f", with model.peft.restore_from_path={adapters}," if adapters else ""
        refused.append(f"{key}={base}{beside} holds another model than the one that the run began with")
    if not refused or job.exp_manager.resume_with_changes:
        for line in refused:
            logger.warning("exp_manager.resume_with_changes=True: %s", line)
        return
    raise UserError(
        f"{start.path} is of a run with other settings, which change its numbers: {'; '.join(refused)}",
        fix="give the settings that the run had; or set exp_manager.resume_with_changes=True to go on with these; or "
        "start a new run in another exp_manager.explicit_log_dir"
        + ("" if job.model.peft.lora else ", from this checkpoint as its model"),
    )
