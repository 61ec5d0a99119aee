# SPDX-License-Identifier: Apache-2.0
"""What is asked once of rows: by whom, in which order it is read, and when it is asked again."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from nemo_aligner.algorithms.asked_once import Question, RowTensors, ask_once
from nemo_aligner.batch import TeacherBatch, TokenBatch
from nemo_aligner.data.collate import collate
from nemo_aligner.data.loader import BatchLoader
from nemo_aligner.data.row import Row, TokenSequence
from nemo_aligner.data.sampler import GlobalBatchSampler
from nemo_aligner.errors import UserError
from nemo_aligner.parallel import world


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with world.ensure_single_process():
        yield


@dataclass(frozen=True)
class Numbers:
    """Rows of one to five tokens; row i is made of i."""

    name: str = "numbers"

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> Row:
        length = 1 + index % 5
        sequence = TokenSequence(tokens=[99, *[index] * length], loss_mask=[False, *[True] * length])
        return Row(sequences=(sequence,))

    @property
    def fingerprint(self) -> dict[str, object]:
        return {"rows": self.name}


@dataclass
class Doubles:
    """Says of each learned token twice its number."""

    batches: list[int] = field(default_factory=list)

    def __call__(self, batches: Sequence[TokenBatch]) -> list[list[RowTensors]]:
        self.batches.append(len(batches))
        found = []
        for batch in batches:
            rows = [batch.tokens[row][batch.loss_tokens()[row]] for row in range(batch.num_rows)]
            found.append([(2.0 * row[:, None].float(), row[:, None].int()) for row in rows])
        return found


@pytest.fixture
def loader() -> BatchLoader[TokenBatch]:
    rows = Numbers()
    return BatchLoader(
        rows,
        GlobalBatchSampler(len(rows), 4, shuffle=True, seed=5, drop_last=False),
        collate=collate,
        dp_rank=0,
        dp_size=1,
        micro_batch_size=2,
        pad_id=0,
        multiple=1,
        max_length=8,
    )


@pytest.fixture
def question() -> Callable[..., Question]:
    def make(ask: Doubles, **source: object) -> Question:
        return Question(
            what="doubles", ask=ask, put=lambda row, tensors: replace(row, teacher=tensors), source=source
        )

    return make


def test_each_row_has_its_own(loader: BatchLoader, question: Callable, tmp_path: Path):
    """In any order, and padded to a TeacherBatch."""
    known = ask_once(question(Doubles()), loader, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.pt", "000001.pt", "000002.pt"]
    for index in (7, 0, 10, 3):
        logprobs, ids = known.dataset[index].teacher
        assert ids[:, 0].tolist() == [index] * (1 + index % 5)
        assert logprobs[:, 0].tolist() == [2.0 * index] * (1 + index % 5)
    for batch in known.batch(2):
        assert isinstance(batch, TeacherBatch)
        learned = batch.loss_tokens()
        assert torch.equal(batch.teacher_ids[..., 0][learned], batch.tokens[learned])
        assert not batch.teacher_logprobs[~learned].any()


def test_only_what_is_missing_is_asked(loader: BatchLoader, question: Callable, tmp_path: Path):
    asked = Doubles()
    ask_once(question(asked, model="a"), loader, tmp_path)
    assert len(asked.batches) == 3
    (tmp_path / "000001.pt").unlink()
    for wanted in (4, 4):
        ask_once(question(asked, model="a"), loader, tmp_path)
        assert len(asked.batches) == wanted


@pytest.mark.parametrize(
    "changed",
    [
        {"source": {"model": "b"}},
        {"dataset": Numbers("others")},
        {"max_length": 9},
        # Of as many files, which hold other rows.
        {"sampler": GlobalBatchSampler(len(Numbers()), 5, shuffle=True, seed=5, drop_last=False)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_other_rows_or_another_source_are_asked_anew(
    loader: BatchLoader, question: Callable, tmp_path: Path, changed: dict[str, object]
):
    asked = Doubles()
    ask_once(question(asked, model="a"), loader, tmp_path)
    source = changed.pop("source", {"model": "a"})
    ask_once(question(asked, **source), replace(loader, **changed), tmp_path)
    assert len(asked.batches) == 6


def test_a_damaged_file_is_named(loader: BatchLoader, question: Callable, tmp_path: Path):
    ask_once(question(Doubles()), loader, tmp_path)
    path = tmp_path / "000002.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{path} is damaged"):
        ask_once(question(Doubles()), replace(loader, dataset=Numbers()), tmp_path)
