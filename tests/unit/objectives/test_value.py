# SPDX-License-Identifier: Apache-2.0
"""The critic's loss against values worked out by hand and a loop in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nemo_aligner.batch import Unit
from nemo_aligner.bounds import check_bounds
from nemo_aligner.errors import UserError
from nemo_aligner.objectives.config import ValueConfig
from nemo_aligner.objectives.protocol import ModelOutput, Wants
from nemo_aligner.objectives.value import ValueLoss, value_loss
from nemo_aligner.rollout_batch import ValueBatch

LENGTHS = (5, 3, 8)


def batch(seed: int = 0, *, fill: float = 0.0) -> tuple[ValueBatch, torch.Tensor]:
    """Three rows and the values that a critic gives now; ``fill`` stands where nothing is learned."""
    draw = torch.Generator().manual_seed(seed)
    index = torch.arange(8)
    mask = torch.stack([(index >= 2) & (index < n) for n in LENGTHS])
    old, returns, now = (
        torch.where(mask, torch.randn(3, 8, generator=draw, dtype=torch.float64), fill) for _ in range(3)
    )
    made = ValueBatch(
        tokens=torch.zeros(3, 8, dtype=torch.int64),
        loss_mask=mask,
        lengths=torch.tensor(LENGTHS),
        values=old,
        returns=returns,
    )
    return made, old + 0.4 * now


def means(made: ValueBatch, now: torch.Tensor, **config: float) -> dict[str, float]:
    loss, metrics = ValueLoss(ValueConfig(**config))(ModelOutput(values=now), made)
    assert metrics["loss"][0] == loss
    assert set(metrics) == set(ValueLoss.metrics)
    return {name: total.item() / max(count.item(), 1) for name, (total, count) in metrics.items()}


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "gradient"),
    [
        (0.1, 0.0, 1.0, 0.5 * 0.9**2, -0.9),  # within the range: plain
        (0.5, 0.0, 1.0, 0.5 * 0.8**2, 0.0),  # beyond it on the return's side: nothing to gain
        (0.5, 0.0, -1.0, 0.5 * 1.5**2, 1.5),  # beyond it on the wrong side: it comes back
        (3.0, 0.0, 1.0, 0.5 * 2.0**2, 2.0),  # past the return and further from it than the clipped one
    ],
)
def test_clipping_by_hand(value: float, old: float, target: float, loss: float, gradient: float):
    x = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    found = value_loss(x, torch.tensor([old]), torch.tensor([target]), clip=0.2)
    found.sum().backward()
    assert found.item() == pytest.approx(loss, rel=1e-7)
    assert x.grad.item() == pytest.approx(gradient, rel=1e-7, abs=1e-12)


@pytest.mark.parametrize("clip", [0.2, 0.0, 1.5])
def test_a_loop_in_float64_says_the_same(clip: float):
    made, now = batch()
    total, binding, tokens = 0.0, 0, 0
    for i, n in enumerate(LENGTHS):
        for t in range(2, n):
            v, old, target = (float(x[i, t]) for x in (now, made.values, made.returns))
            error = (v - target) ** 2
            if clip:
                near = (min(max(v, old - clip), old + clip) - target) ** 2
                error, binding = max(error, near), binding + (near > error)
            total, tokens = total + 0.5 * error, tokens + 1
    found = means(made, now, loss_clip_val=clip)
    assert found["loss"] == pytest.approx(total / tokens, rel=1e-12)
    assert found["clip_fraction"] == pytest.approx(binding / tokens)
    assert found["values"] == pytest.approx(np.mean(now.numpy()[made.loss_mask.numpy()]), rel=1e-12)
    assert found["returns"] == pytest.approx(np.mean(made.returns.numpy()[made.loss_mask.numpy()]), rel=1e-12)


@pytest.mark.parametrize("clip", [0.2, 0.0])
def test_gradcheck(clip: float):
    made, now = batch()

    def loss(values: torch.Tensor) -> torch.Tensor:
        return ValueLoss(ValueConfig(loss_clip_val=clip))(ModelOutput(values=values), made)[0]

    assert torch.autograd.gradcheck(loss, (now.requires_grad_(),))


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), -1e30])
def test_what_stands_where_nothing_is_learned_does_not_matter(fill: float):
    made, now = batch()
    littered, noisy = batch(fill=fill)
    now.requires_grad_()
    noisy = torch.where(made.loss_mask, now.detach(), noisy).requires_grad_()
    loss, _ = ValueLoss()(ModelOutput(values=now), made)
    dirty, _ = ValueLoss()(ModelOutput(values=noisy), littered)
    assert torch.equal(loss, dirty)
    assert torch.equal(*(torch.autograd.grad(x, y)[0] for x, y in ((loss, now), (dirty, noisy))))


def test_filler_rows_packing_and_micro_batches_change_nothing():
    made, now = batch()
    expected = pytest.approx(means(made, now), rel=1e-12)
    rows = torch.tensor([2, 0, 1, 1, 0])
    mask = made.loss_mask[rows]
    mask[3:] = False
    filled = ValueBatch(
        tokens=made.tokens[rows],
        loss_mask=mask,
        lengths=made.lengths[rows],
        values=made.values[rows],
        returns=made.returns[rows],
    )
    assert means(filled, now[rows]) == expected

    def packed(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[i, :n] for i, n in enumerate(LENGTHS)])[None]

    one_row = ValueBatch(
        **{name: packed(getattr(made, name)) for name in ("tokens", "loss_mask", "values", "returns")},
        lengths=made.lengths,
        cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0).int(),
    )
    assert means(one_row, packed(now)) == expected
    whole, _ = ValueLoss()(ModelOutput(values=now), made)
    parts = [
        ValueLoss()(ModelOutput(values=now[i : i + 1]), part)[0].item()
        for i, part in enumerate(made.split(1))
    ]
    assert sum(parts) == pytest.approx(whole.item(), rel=1e-12)


def test_nothing_learned_is_no_loss_and_no_gradient():
    made, now = batch(fill=float("nan"))
    empty = replace(made, loss_mask=torch.zeros_like(made.loss_mask))
    loss, metrics = ValueLoss()(ModelOutput(values=now.requires_grad_()), empty)
    loss.backward()
    assert (loss.item(), int(metrics["loss"][1])) == (0, 0)
    assert not now.grad.any()


def test_what_it_asks_for_and_refuses():
    objective = ValueLoss()
    assert (objective.wants, objective.unit) == ({Wants.VALUES}, Unit.TOKEN)
    assert objective.config.loss_clip_val == 0.2
    check_bounds(ValueConfig(loss_clip_val=0), "model")
    with pytest.raises(UserError, match=r"model.loss_clip_val=-0.1 is negative"):
        check_bounds(ValueConfig(loss_clip_val=-0.1), "model")
