# SPDX-License-Identifier: Apache-2.0
"""Negative log-likelihood against hand-computed values and torch's cross entropy."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nemo_aligner.batch import TokenBatch, Unit
from nemo_aligner.objectives.nll import NLL, nll
from nemo_aligner.objectives.protocol import ModelOutput, Wants

VOCAB, LENGTHS = 7, (5, 2, 8, 3)


def rows(seed: int = 0, *, pad_id: int = 0, seq_length: int = 8) -> TokenBatch:
    """Rows of uneven length, about half of their tokens learned, the first ones too."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for n in LENGTHS:
        ids = torch.randint(0, VOCAB, (n,), generator=draw).tolist()
        made.append((ids, (torch.rand(n, generator=draw) < 0.6).tolist()))
    return TokenBatch.from_rows(made, pad_id=pad_id, seq_length=seq_length)


def packed(batch: TokenBatch) -> TokenBatch:
    def row(x: Tensor) -> Tensor:
        return torch.cat([x[i, :n] for i, n in enumerate(batch.lengths.tolist())])[None]

    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return TokenBatch(
        tokens=row(batch.tokens), loss_mask=row(batch.loss_mask), lengths=batch.lengths, cu_seqlens=bounds
    )


def logprobs_of(batch: TokenBatch, seed: int = 3) -> Tensor:
    """[B, S] log-probs of a model that looks at nothing but the position within the row and the row's length."""
    logp = torch.randn(
        9, 8, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).log_softmax(-1)
    at = logp[batch.lengths[batch.sequence_ids()], batch.positions()]
    return at.gather(2, batch.tokens[..., None])[..., 0].masked_fill(batch.starts(), 0)


def loss_of(batch: TokenBatch, logprobs: Tensor | None = None) -> tuple[float, int]:
    """(mean, count) as the engine makes them."""
    given = logprobs_of(batch) if logprobs is None else logprobs
    loss, metrics = NLL()(ModelOutput(logprobs=given), batch)
    (total, count) = metrics["loss"]
    assert total == loss
    return loss.item() / count.item(), int(count)


def test_hand_computed_values():
    half, quarter = math.log(0.5), math.log(0.25)
    logprobs = torch.tensor([[0.0, half, quarter], [0.0, quarter, -9.0]])
    mask = torch.tensor([[False, True, True], [False, True, False]])
    assert nll(logprobs, mask).item() == pytest.approx(5 * math.log(2))
    assert nll(logprobs, torch.zeros_like(mask)).item() == 0


def test_it_is_torchs_cross_entropy():
    batch = rows()
    logits = torch.randn(4, 8, VOCAB, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = batch.tokens.where(batch.loss_mask, -100)[:, 1:]
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, VOCAB), labels.reshape(-1), ignore_index=-100
    )
    logprobs = torch.zeros(4, 8, dtype=torch.float64)
    logprobs[:, 1:] = logits[:, :-1].log_softmax(-1).gather(2, batch.tokens[:, 1:, None])[..., 0]
    mean, count = loss_of(batch, logprobs)
    assert mean == pytest.approx(expected.item(), rel=1e-12)
    assert count == (labels != -100).sum()


def test_the_gradient_raises_learned_tokens_and_leaves_others():
    batch = rows()
    logprobs = logprobs_of(batch).requires_grad_()
    loss, _ = NLL()(ModelOutput(logprobs=logprobs), batch)
    loss.backward()
    assert torch.equal(logprobs.grad < 0, batch.loss_tokens())
    assert torch.equal(logprobs.grad != 0, batch.loss_tokens())


def test_gradcheck():
    mask = rows().loss_tokens()
    x = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda logprobs: nll(logprobs, mask), (x.requires_grad_(),))


def test_the_weights_told_beforehand_are_the_gradient():
    for batch in (rows(), packed(rows())):
        logprobs = logprobs_of(batch).requires_grad_()
        loss, _ = NLL()(ModelOutput(logprobs=logprobs), batch)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        torch.testing.assert_close(gradient, NLL().logprob_grad(batch).double(), rtol=0, atol=0)


def test_padding_packing_and_row_order_change_nothing():
    mean, count = loss_of(rows())
    assert loss_of(rows(pad_id=5, seq_length=8)) == (mean, count)
    assert loss_of(packed(rows())) == (pytest.approx(mean, rel=1e-12), count)
    order = torch.tensor([2, 0, 3, 1])
    batch = rows()
    shuffled = TokenBatch(
        tokens=batch.tokens[order], loss_mask=batch.loss_mask[order], lengths=batch.lengths[order]
    )
    assert loss_of(shuffled) == (pytest.approx(mean, rel=1e-12), count)


def test_micro_batches_add_up():
    mean, count = loss_of(rows())
    parts = [loss_of(part) for part in rows().split(2)]
    assert sum(n for _, n in parts) == count
    assert sum(m * n for m, n in parts) == pytest.approx(mean * count, rel=1e-12)


def test_nothing_learned_is_no_loss_and_no_gradient():
    batch = replace(rows(), loss_mask=torch.zeros(4, 8, dtype=torch.bool))
    logprobs = logprobs_of(batch).requires_grad_()
    loss, metrics = NLL()(ModelOutput(logprobs=logprobs), batch)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert (loss.item(), int(metrics["loss"][1])) == (0, 0)
    assert not gradient.any()


def test_what_it_asks_for():
    assert (NLL.wants, NLL.unit, NLL.metrics) == ({Wants.LOGPROBS}, Unit.TOKEN, ("loss",))
