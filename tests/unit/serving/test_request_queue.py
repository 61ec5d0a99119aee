# SPDX-License-Identifier: Apache-2.0
import threading

import numpy as np
import pytest
import torch

from nemo_aligner.batch import TokenBatch
from nemo_aligner.serving.protocol import Refusal, RequestVersion, Trouble
from nemo_aligner.serving.request_queue import (
    QueuedRequest,
    RequestQueue,
    SaveRequest,
    ServedScores,
    merge,
    split,
)
from nemo_aligner.serving.wire import InferRequest

TICKET = RequestVersion(run_id="r", step=0, sequence=0)


def rows(*lengths: int, width: int = 0) -> TokenBatch:
    mask = torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]
    return TokenBatch(tokens=mask * 7, loss_mask=mask, lengths=torch.tensor(lengths))


def ask(num_rows: int, version: RequestVersion | None = None) -> QueuedRequest:
    return QueuedRequest(
        request=InferRequest(
            batch=rows(*[3] * num_rows), width=3, version=version, exceeded=np.zeros(num_rows, dtype=np.bool_)
        )
    )


def taken(inbox: RequestQueue) -> list[list[int]]:
    """The numbers of rows that are computed together, until none waits."""
    groups = []
    while entries := inbox.take(0.0):
        groups.append([entry.num_rows for entry in entries])
    return groups


def test_requests_are_taken_together_in_order_up_to_the_limit() -> None:
    inbox = RequestQueue(max_rows=4)
    inbox.put([ask(1), ask(2), ask(2), ask(9), ask(1)])
    assert taken(inbox) == [[1, 2], [2], [9], [1]]


def test_requests_of_a_training_and_saves_are_taken_alone() -> None:
    inbox = RequestQueue(max_rows=100)
    inbox.put(
        [
            ask(1),
            ask(2, TICKET),
            ask(3, TICKET),
            ask(4),
            ask(5),
            QueuedRequest(request=SaveRequest(version=None)),
        ]
    )
    assert taken(inbox) == [[1], [2], [3], [4, 5], [0]]


def test_none_comes_and_an_empty_group_is_none() -> None:
    inbox = RequestQueue(max_rows=4)
    inbox.put([])
    assert inbox.take(0.01) == []


def test_all_that_wait_are_reported_the_error() -> None:
    inbox = RequestQueue(max_rows=1)
    entries = [ask(1) for _ in range(40)]
    for start in range(0, 40, 4):
        inbox.put(entries[start : start + 4])
    assert inbox.take(0.0) == entries[:1]
    error = Refusal(Trouble.STOPPING, "ends")
    threads = [threading.Thread(target=inbox.fail, args=[error]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert all(entry.reply.exception(0) is error for entry in entries[1:])
    assert not entries[0].reply.done()


def test_rows_of_several_widths_are_merged_and_shared_out_again() -> None:
    batches = [rows(2), rows(5, 1), rows(3, 3, width=4)]
    merged = merge(batches)
    assert merged.tokens.shape == (5, 5)
    assert merged.lengths.tolist() == [2, 5, 1, 3, 3]
    assert torch.equal(merged.loss_mask.sum(1), merged.lengths)
    assert torch.equal(merged.tokens != 0, merged.loss_mask)
    scores = ServedScores(rewards=torch.arange(5.0), values=torch.arange(25.0).view(5, 5))
    parts = split(scores, batches)
    assert [part.rewards.tolist() for part in parts if part.rewards is not None] == [[0], [1, 2], [3, 4]]
    assert [part.values.tolist() for part in parts if part.values is not None] == [
        [[0, 1]],
        [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]],
        [[15, 16, 17, 18], [20, 21, 22, 23]],
    ]


@pytest.mark.parametrize(("multiple", "width"), [(None, 9), (1, 5), (4, 8), (16, 9)])
def test_padding_is_cut_to_a_multiple_and_comes_back_as_zeros(multiple: int | None, width: int) -> None:
    batches = [rows(2, 5, width=9)]
    merged = merge(batches, length_multiple=multiple)
    assert merged.seq_length == width
    (part,) = split(ServedScores(rewards=None, values=torch.ones(2, width)), batches)
    assert part.rewards is None
    assert part.values is not None
    assert part.values.sum(1).tolist() == [width, width]
    assert part.values.shape == (2, 9)
