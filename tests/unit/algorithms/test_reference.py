# SPDX-License-Identifier: Apache-2.0
"""What batches learn of a reference: its log-probs, and the KL to it of a whole step."""

import contextlib
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from nemo_aligner.algorithms.reference import RenewedReference, annotate_rated
from nemo_aligner.batch import MismatchedResponses, TokenBatch


class Tables:
    """A policy that gives token t the log-prob ``now[t]``, and ``then[t]`` as its own reference."""

    def __init__(self, now: Sequence[float], then: Sequence[float]) -> None:
        self._table, self._then = torch.tensor(now), torch.tensor(then)

    def logprobs(self, batch: TokenBatch, *, loss_tokens_only: bool = False) -> Tensor:
        found = self._table[batch.tokens]
        return found * batch.loss_mask if loss_tokens_only else found

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        self._table, self._then = self._then, self._table
        yield
        self._table, self._then = self._then, self._table


def batch(*rows: tuple[list[int], list[int]], pads: int = 0) -> MismatchedResponses:
    """After the prompt 0 the two responses of each row; then padding rows."""
    sequences = [([0, *ids], [False, *[True] * len(ids)]) for row in rows for ids in row]
    sequences += [([0], [False])] * (2 * pads)
    tokens = TokenBatch.from_rows(sequences, pad_id=0, seq_length=4)
    return tokens.extended(
        MismatchedResponses, good=torch.tensor([True, True, False, False])[: len(sequences)]
    )


NOW, THEN = [0.0, -1.0, -2.0, -4.0], [0.0, -2.0, -2.5, -1.0]


def test_the_kl_is_the_mean_over_mismatched_responses_of_all_micro_batches():
    policy = Tables(NOW, THEN)
    batches = [batch(([1], [2, 2]), ([3], [1])), batch(([2, 3], [3]), pads=1)]
    found = annotate_rated(policy, batches)
    # The mismatched responses are [2, 2], [1] and [3]: 1 + 1 - 3, over three, is below 0.
    assert [part.kl_baseline.tolist() for part in found] == [[0.0, 0.0]] * 2
    found = annotate_rated(policy, [batches[0], batch(([2, 3], [1, 2]), pads=1)])
    # With [1, 2] for [3]: 1 + 1 + 1.5.
    for part in found:
        assert part.kl_baseline.tolist() == pytest.approx([3.5 / 3] * 2)
    assert [part.reference_sums.tolist() for part in found] == [[-2.0, -1.0], [-3.5, 0.0]]
    assert [part.good.tolist() for part in found] == [[True, False]] * 2
    assert [part.tokens[0].tolist() for part in found] == [[0, 1, 0, 0], [0, 2, 3, 0]]


def test_a_reference_is_renewed_before_the_first_step_of_the_next():
    renewed: list[int] = []
    reference = RenewedReference(every=2, number=0, renew=renewed.append)
    seen = []
    for step in range(1, 6):
        reference.before_step(step)
        seen.append(reference.number)
    assert (seen, renewed) == ([0, 0, 1, 1, 2], [1, 2])
