# SPDX-License-Identifier: Apache-2.0
"""Log-probs of supervised batches by another model than the one that is trained: a reference, or a teacher.

The reference is the policy as training began with it, or as it was some steps ago. Either its weights are swapped in at
each step, or its log-probs are computed once, before the first step. A teacher is asked at each step, or once too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_aligner.algorithms.asked_once import Question, RowTensors
from nemo_aligner.batch import (
    MismatchedResponses,
    PreferenceBatch,
    RatedResponses,
    ReferencedPairs,
    TeacherBatch,
    TokenBatch,
)
from nemo_aligner.data.row import Row
from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface, TeacherInterface
from nemo_aligner.objectives.reduce import kl_baseline, log_ratios
from nemo_aligner.parallel import collectives, world


@dataclass(kw_only=True)
class RenewedReference:
    """A reference that becomes the policy as it is, every so many steps.

    In DPO this is the hard update of trust region DPO (Gorbatovski 2024, arXiv 2404.09656).
    """

    every: int  # steps
    number: int  # of the reference that the policy keeps, from 0
    renew: Callable[[int], None]  # makes the policy as it is now the reference of a number

    def before_step(self, step: int) -> None:
        """Renew the reference, if ``step`` is the first of another one."""
        number = reference_at(step, self.every)
        if number != self.number:
            self.renew(number)
            self.number = number


def reference_at(step: int, every: int) -> int:
    """The number, from 0, of the reference of a step, from 1.

    >>> [reference_at(step, 3) for step in (1, 3, 4, 7)]
    [0, 0, 1, 2]
    """
    return (step - 1) // every


def annotate_by_swap(
    policy: AlignableGenerativeInterface, batches: Sequence[TokenBatch], *, pairs: int | None = None
) -> list[ReferencedPairs]:
    """Return the batches of pairs with the reference's log-probs, by the policy with the reference's weights.

    Args:
        pairs: of a forward pass; None: a micro-batch.
    """
    with policy.as_reference():
        return referenced(policy, batches, pairs)


def referenced(
    policy: AlignableGenerativeInterface, batches: Sequence[TokenBatch], pairs: int | None
) -> list[ReferencedPairs]:
    """Return the batches of pairs with the log-probs of ``policy``, which has the reference's weights now."""
    found: list[ReferencedPairs] = []
    for batch in batches:
        assert isinstance(batch, PreferenceBatch), type(batch)
        batch = batch.to(world.device())
        found.append(batch.extended(ReferencedPairs, reference_sums=_sums(policy, batch, pairs)))
    return found


def _sums(policy: AlignableGenerativeInterface, batch: TokenBatch, rows: int | None) -> Tensor:
    """[N] float: log-probs summed over each sequence's loss tokens, so many rows of data in a forward pass."""
    size = batch.sequences_per_row * (rows or batch.num_rows)
    parts = [batch.take(slice(i, i + size)) for i in range(0, batch.num_rows, size)]
    return torch.cat([part.per_sequence(policy.logprobs(part, loss_tokens_only=True)) for part in parts])


def annotate_rated(
    policy: AlignableGenerativeInterface, batches: Sequence[TokenBatch], *, rows: int | None = None
) -> list[RatedResponses]:
    """Return the responses alone, with the reference's log-probs and the KL that they are compared with.

    The KL is one number of the step: estimated by the mismatched responses of all micro-batches and ranks.

    Args:
        rows: of a forward pass; None: a micro-batch.
    """
    mixed: list[MismatchedResponses] = []
    for batch in batches:
        assert isinstance(batch, MismatchedResponses), type(batch)
        mixed.append(batch.to(world.device()))
    with policy.as_reference():
        references = [_sums(policy, batch, rows) for batch in mixed]
    ratios = torch.zeros(2, device=world.device())
    for batch, reference in zip(mixed, references, strict=True):
        mismatched = batch.take(slice(1, None, 2))
        real = mismatched.loss_lengths() > 0
        ratios += log_ratios(_sums(policy, mismatched, rows), reference[1::2], real)
    kl = kl_baseline(*collectives.sum_over_data_parallel(ratios))
    responses = [batch.take(slice(0, None, 2)) for batch in mixed]
    return [
        own.extended(RatedResponses, reference_sums=reference[::2], kl_baseline=kl.expand(own.num_rows))
        for own, reference in zip(responses, references, strict=True)
    ]


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


def reference_question(
    policy: AlignableGenerativeInterface, *, source: Mapping[str, object], pairs: int | None
) -> Question:
    """The log-probs of ``policy`` as it is now, which is the reference, of both responses of each pair.

    Args:
        policy: with the reference's weights.
        source: see Question.
        pairs: as in :func:`annotate_by_swap`.
    """

    def ask(batches: Sequence[TokenBatch]) -> list[list[RowTensors]]:
        found: list[list[RowTensors]] = []
        for batch in referenced(policy, batches, pairs):
            sums = collectives.broadcast_from_last_stage(batch.reference_sums, (len(batch.lengths),)).cpu()
            found.append([(both,) for both in sums.view(-1, batch.sequences_per_row)])
        return found

    def put(row: Row, tensors: RowTensors) -> Row:
        (sums,) = tensors
        return replace(row, reference_logprobs=tuple(map(float, sums)))

    return Question(what="the reference's log-probs", ask=ask, put=put, source=source)


def teacher_question(
    teacher: Callable[[], TeacherInterface], *, source: Mapping[str, object], top_k: int
) -> Question:
    """The teacher's most likely tokens at each loss token.

    Args:
        teacher: loads it; called where something is to be asked.
        source: see Question.
        top_k: as in :func:`annotate_by_teacher`.
    """

    def ask(batches: Sequence[TokenBatch]) -> list[list[RowTensors]]:
        found: list[list[RowTensors]] = []
        for batch in annotate_by_teacher(teacher(), batches, top_k=top_k):
            shape = tuple(batch.teacher_ids.shape)
            logprobs = collectives.broadcast_from_last_stage(batch.teacher_logprobs, shape).cpu()
            ids = collectives.broadcast_from_last_stage(batch.teacher_ids, shape, dtype=torch.int32).cpu()
            learned = batch.loss_tokens().cpu()
            found.append(
                [
                    (logprobs[row][learned[row]], ids[row][learned[row]].to(torch.int32))
                    for row in range(batch.num_rows)
                ]
            )
        return found

    def put(row: Row, tensors: RowTensors) -> Row:
        logprobs, ids = tensors
        return replace(row, teacher=(logprobs, ids))

    return Question(
        what="the teacher's most likely tokens", ask=ask, put=put, source={**source, "top_k": top_k}
    )
