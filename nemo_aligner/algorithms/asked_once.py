# SPDX-License-Identifier: Apache-2.0
"""Tensors that another model gives for every row of a data set: asked for once, before training, and kept in files.

A file holds a global batch of rows, in the data set's order, so a run that is killed meanwhile goes on where it stood.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from nemo_aligner.batch import TokenBatch
from nemo_aligner.data.loader import BatchLoader, Rows
from nemo_aligner.data.row import Row
from nemo_aligner.data.sampler import GlobalBatchSampler, rank_rows
from nemo_aligner.errors import report_damage
from nemo_aligner.parallel import collectives, world
from nemo_aligner.run.disk import report_if_full

logger = logging.getLogger(__name__)

RowTensors = tuple[Tensor, ...]
_FILES_OPEN = 256  # of which a row is read where it lies


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question to a model about rows."""

    what: str  # its name in messages, as in "the reference's log-probs"
    # micro-batches to the tensors of each of their rows, padding rows too, on every rank of a model
    ask: Callable[[Sequence[TokenBatch]], Sequence[Sequence[RowTensors]]]
    put: Callable[[Row, RowTensors], Row]  # a row with its tensors
    # whatever besides the rows' texts these follow from: the model, how texts become tokens
    source: Mapping[str, object]


@dataclass(frozen=True)
class _File:
    """The content of a file."""

    digest: str
    rows: list[RowTensors]


@dataclass(frozen=True)
class _KnownRows:
    """A data set whose rows carry what was asked."""

    rows: Rows
    files: Sequence[Path]
    per_file: int
    put: Callable[[Row, RowTensors], Row]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        number, place = divmod(index, self.per_file)
        return self.put(self.rows[index], _read(self.files[number]).rows[place])

    @property
    def fingerprint(self) -> dict[str, object]:
        """As the rows'."""
        return self.rows.fingerprint


def ask_once(question: Question, loader: BatchLoader[TokenBatch], folder: Path) -> BatchLoader[TokenBatch]:
    """Return the loader with rows that carry what the model says now. Called by every rank.

    Args:
        question: the model is not asked where files of the same rows and the same source are there.
        loader: of training, or of a validation set.
        folder: of the files.

    Raises:
        UserError: a file is damaged, or the disk is full.
    """
    size, total = loader.sampler.global_batch_size, len(loader.dataset)
    asked = [loader.dataset.fingerprint, loader.max_length, size, question.source]
    digest = json.dumps(asked, sort_keys=True, default=str)
    files = [folder / f"{number:06}.pt" for number in range(-(-total // size))]
    known = collectives.from_rank_0(lambda: {path for path in files if _is_of(path, digest)})
    one_by_one = GlobalBatchSampler(total, size, shuffle=False, seed=0, drop_last=False)
    in_order = replace(loader, sampler=one_by_one, packing=False)
    for number, path in enumerate(files):
        if path not in known:
            with world.phase(f"computing {question.what}"):
                rows = _ask(question, in_order, number)
                collectives.from_rank_0(partial(_keep, path, _File(digest, rows), question.what))
    if len(known) < len(files) and world.is_logging_rank():
        logger.info("%s of %d rows are computed and kept in %s", question.what, total, folder)
    return replace(loader, dataset=_KnownRows(loader.dataset, files, size, question.put))


def _ask(question: Question, loader: BatchLoader[TokenBatch], number: int) -> list[RowTensors]:
    """The tensors of the rows of a global batch, in their order, on every rank."""
    places = rank_rows(
        loader.sampler.rows(number),
        dp_rank=world.dp_rank(),
        dp_size=world.dp_size(),
        micro_batch_size=loader.micro_batch_size,
    )
    found = question.ask(loader.batch(number))
    mine = {
        row: tensors
        for rows, several in zip(places, found, strict=True)
        for row, tensors in zip(rows, several, strict=False)
    }
    every = collectives.merged_over_data_parallel(mine)
    return [every[row] for row in sorted(every)]


def _is_of(path: Path, digest: str) -> bool:
    return path.exists() and _read(path).digest == digest


@lru_cache(maxsize=_FILES_OPEN)
def _read(path: Path) -> _File:
    with report_damage(f"{path} is damaged", fix="remove it: what it holds is computed again"):
        return _File(**torch.load(path, weights_only=True, mmap=True))


def _keep(path: Path, content: _File, what: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    with report_if_full(path.parent, what):
        # A copy of each tensor, as a view is saved with all that it is a view of.
        rows = [tuple(tensor.clone() for tensor in tensors) for tensors in content.rows]
        torch.save({"digest": content.digest, "rows": rows}, fresh)
        fresh.replace(path)
    _read.cache_clear()
