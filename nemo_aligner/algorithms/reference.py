# SPDX-License-Identifier: Apache-2.0
"""Log-probs of supervised batches by another model than the one that is trained: a reference, or a teacher.

The reference is the policy as training began with it. Either its weights are swapped in at each step, or its log-probs
are computed once, before the first step, and stored.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from nemo_aligner.batch import (
    MismatchedResponses,
    PreferenceBatch,
    RatedResponses,
    ReferencedPairs,
    TeacherBatch,
    TokenBatch,
)
from nemo_aligner.data.loader import BatchLoader, Rows
from nemo_aligner.data.row import Row
from nemo_aligner.data.sampler import GlobalBatchSampler, rank_rows
from nemo_aligner.errors import report_damage
from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface, TeacherInterface
from nemo_aligner.objectives.reduce import kl_baseline, log_ratios
from nemo_aligner.parallel import collectives, world
from nemo_aligner.run.disk import report_if_full

logger = logging.getLogger(__name__)


def annotate_by_swap(
    policy: AlignableGenerativeInterface, batches: Sequence[TokenBatch], *, pairs: int | None = None
) -> list[ReferencedPairs]:
    """Return the batches of pairs with the reference's log-probs, by the policy with the reference's weights.

    Args:
        pairs: of a forward pass; None: a micro-batch.
    """
    with policy.as_reference():
        return _annotated(policy, batches, pairs)


def _annotated(
    policy: AlignableGenerativeInterface, batches: Sequence[TokenBatch], pairs: int | None
) -> list[ReferencedPairs]:
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


@dataclass(frozen=True)
class _ReferencedRows:
    """A data set whose rows carry the reference's log-probs."""

    rows: Rows
    logprobs: Tensor  # [rows, sequences of a row] float

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return replace(self.rows[index], reference_logprobs=tuple(map(float, self.logprobs[index])))

    @property
    def fingerprint(self) -> dict[str, object]:
        """As the rows'."""
        return self.rows.fingerprint


def with_stored_reference(
    policy: AlignableGenerativeInterface,
    loader: BatchLoader[TokenBatch],
    path: Path,
    *,
    source: Mapping[str, object],
    pairs: int | None = None,
) -> BatchLoader[TokenBatch]:
    """Return the loader with rows that carry the log-probs of ``policy`` as it is now. Called by every rank.

    Args:
        policy: with the reference's weights.
        path: where the log-probs are kept; a run that goes on takes them from there, if they are of the same rows and
            the same ``source``.
        pairs: as in :func:`annotate_by_swap`.
        source: whatever besides the rows' texts the log-probs follow from: the model, how texts become tokens.

    Raises:
        UserError: the file is damaged, or the disk is full.
    """
    digest = json.dumps([loader.dataset.fingerprint, source], sort_keys=True, default=str)
    known = collectives.from_rank_0(lambda: _read(path, digest))
    if known is None:
        known = _logprobs(policy, loader, pairs)
        collectives.from_rank_0(lambda: _keep(path, digest, known))
    return replace(loader, dataset=_ReferencedRows(loader.dataset, known))


def _read(path: Path, digest: str) -> Tensor | None:
    if not path.exists():
        return None
    with report_damage(f"{path} is damaged", fix="remove it: the reference's log-probs are computed again"):
        kept = torch.load(path, weights_only=True)
        return kept["logprobs"] if kept["rows"] == digest else None


def _keep(path: Path, digest: str, logprobs: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    with report_if_full(path.parent, "the reference's log-probs"):
        torch.save({"rows": digest, "logprobs": logprobs}, fresh)
        fresh.replace(path)
    logger.info("the reference's log-probs of %d rows are computed and kept in %s", len(logprobs), path)


@world.phase("computing the reference's log-probs")
def _logprobs(
    policy: AlignableGenerativeInterface, loader: BatchLoader[TokenBatch], pairs: int | None
) -> Tensor:
    """[rows, sequences of a row] float on every rank, in the order of the data set."""
    size, total = loader.sampler.global_batch_size, len(loader.dataset)
    sampler = GlobalBatchSampler(total, size, shuffle=False, seed=0, drop_last=False)
    ordered = replace(loader, sampler=sampler)
    table = torch.zeros(total, len(loader.dataset[0].sequences))
    for index in range(sampler.batches_per_epoch):
        places = rank_rows(
            sampler.rows(index),
            dp_rank=world.dp_rank(),
            dp_size=world.dp_size(),
            micro_batch_size=loader.micro_batch_size,
        )
        for rows, batch in zip(places, _annotated(policy, ordered.batch(index), pairs), strict=True):
            table[rows] = batch.reference_sums.view(-1, table.shape[1])[: len(rows)].cpu()
    # Every row is one data parallel rank's, and 0 elsewhere.
    whole = collectives.sum_over_data_parallel(table.to(world.device()))
    return collectives.broadcast_from_last_stage(whole, tuple(whole.shape)).cpu()
