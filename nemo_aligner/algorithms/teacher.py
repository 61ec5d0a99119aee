# SPDX-License-Identifier: Apache-2.0
"""The most likely tokens of a teacher, for supervised batches."""

from collections.abc import Sequence

from nemo_aligner.batch import TeacherBatch, TokenBatch
from nemo_aligner.models.alignable_interface import TeacherInterface
from nemo_aligner.parallel import world


def annotate_by_teacher(
    teacher: TeacherInterface, batches: Sequence[TokenBatch], *, top_k: int
) -> list[TeacherBatch]:
    """Return the batches with the ``top_k`` most likely tokens of the teacher, and their log-probs."""
    found: list[TeacherBatch] = []
    for batch in batches:
        batch = batch.to(world.device())
        logprobs, ids = teacher.topk(batch, top_k)
        found.append(batch.extended(TeacherBatch, teacher_logprobs=logprobs, teacher_ids=ids))
    return found
