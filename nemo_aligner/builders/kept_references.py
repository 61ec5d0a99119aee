# SPDX-License-Identifier: Apache-2.0
"""References of a run that changes its own: kept in the run's folder, beside the checkpoints."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from nemo_aligner.algorithms.reference import RenewedReference, reference_at
from nemo_aligner.builders.models import Pretrained, go_on_from
from nemo_aligner.checkpoint.sharded import load_model, model_state, save_state
from nemo_aligner.checkpoint.trainer_state import Checkpoint
from nemo_aligner.errors import UserError, report_damage
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.parallel import collectives, world
from nemo_aligner.run.disk import report_if_full
from nemo_aligner.run.experiment import Experiment

_FOLDER = "references"


@dataclass(frozen=True, kw_only=True)
class KeptReferences:
    """The references after the first one, which is the model as training began, by their numbers."""

    policy: GPTPolicy
    run: Experiment

    def load(self, number: int, start: Checkpoint) -> None:
        """Give the policy the weights of the reference that ``start`` was trained with, and keep it here too.

        Raises:
            UserError: it is not there, or damaged.
        """
        # Of the run that start is of, which may be another one.
        path = start.path.parents[1] / _FOLDER / str(number)
        fix = "put it back; or start a new run in another exp_manager.explicit_log_dir, from this checkpoint's .nemo"
        if not path.exists():
            raise UserError(f"{path} is not there: the reference that {start.path} is trained with", fix=fix)
        with report_damage(f"{path} is damaged", fix=fix):
            load_model(self.policy.model, path)
        if not self._path(number).exists():
            self._save(number)

    def renew(self, number: int) -> None:
        """Make the policy as it is now the reference of this number."""
        self.policy.keep_reference()
        if self.run.config.create_checkpoint_callback:
            self._save(number)

    def _path(self, number: int) -> Path:
        return self.run.folder / _FOLDER / str(number)

    def _save(self, number: int) -> None:
        path = self._path(number)
        staging = path.with_name(f".{number}")
        with report_if_full(self.run.folder, "a reference"):
            collectives.from_rank_0(lambda: shutil.rmtree(staging, ignore_errors=True))
            save_state(model_state(self.policy.model), staging)
            world.barrier()
            collectives.from_rank_0(lambda: _put(staging, path))


def _put(staging: Path, path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    staging.rename(path)


def renewed_reference(
    run: Experiment, pretrained: Pretrained[GPTPolicy], start: Checkpoint | None, *, every: int
) -> RenewedReference:
    """Make the model the reference that ``start`` was trained with, then go on from ``start``.

    Args:
        every: steps after which the model becomes its own next reference.

    Raises:
        UserError: the reference that ``start`` was trained with is not there, or damaged.
    """
    references = KeptReferences(policy=pretrained.learner, run=run)
    number = 0 if start is None else reference_at(start.state.step, every)
    if start is not None and number:
        references.load(number, start)
    pretrained.learner.keep_reference()
    go_on_from(pretrained, start)
    return RenewedReference(every=every, number=number, renew=references.renew)
