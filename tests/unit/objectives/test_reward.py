# SPDX-License-Identifier: Apache-2.0
"""Losses of reward models against worked-out values, numpy in float64, and batches cut or filled up otherwise."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from nemo_aligner.batch import AttributeBatch, LabeledPairs, PreferenceBatch, TokenBatch
from nemo_aligner.errors import UserError
from nemo_aligner.objectives.config import RegressionConfig
from nemo_aligner.objectives.protocol import ModelOutput, Objective
from nemo_aligner.objectives.reward import AttributePairs, BradleyTerry, Regression, bradley_terry
from nemo_aligner.run.metrics import means as metrics_means

NAN = math.nan


def rows(lengths: list[int]) -> dict[str, Tensor]:
    """Rows whose last token is the one that counts; a row of one token is padding."""
    flags = [[*[False] * (n - 1), n > 1] for n in lengths]
    batch = TokenBatch.from_rows(
        [([1] * n, f) for n, f in zip(lengths, flags, strict=True)], pad_id=0, seq_length=max(lengths)
    )
    return {"tokens": batch.tokens, "loss_mask": batch.loss_mask, "lengths": batch.lengths}


def means(objective: Objective, rewards: Tensor, batch: TokenBatch) -> dict[str, float]:
    loss, metrics = objective(ModelOutput(rewards=rewards), batch)
    assert set(metrics) == set(objective.metrics)
    assert float(loss.detach()) == pytest.approx(float(metrics["loss"][0]))
    return metrics_means({name: (float(total), float(count)) for name, (total, count) in metrics.items()})


def test_pairs_by_hand():
    rewards = torch.tensor([[2.0], [0.0], [1.0], [4.0], [9.0], [9.0]], dtype=torch.float64)
    found = means(
        BradleyTerry(), rewards, PreferenceBatch(**rows([3, 5, 2, 2, 1, 1]), given_rewards=torch.zeros(6))
    )
    assert found["loss"] == pytest.approx((math.log(1 + math.exp(-2)) + math.log(1 + math.exp(3))) / 2)
    assert found["acc"] == 0.5
    assert (found["rewards_chosen_mean"], found["rewards_rejected_mean"]) == (1.5, 2.0)
    assert found["rewards_all_mean"] == 1.75
    assert found["rewards_all_std"] == pytest.approx(np.std([2.0, 0.0, 1.0, 4.0]))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("regular_bt", lambda margin, _: np.log1p(np.exp(-margin))),
        ("margin_bt", lambda margin, strength: np.log1p(np.exp(-(margin - strength)))),
        ("scaled_bt", lambda margin, strength: strength * np.log1p(np.exp(-margin))),
    ],
)
def test_pairs_by_label(loss: str, expected):
    draw = torch.Generator().manual_seed(0)
    outputs = torch.randn(6, 5, generator=draw, dtype=torch.float64)
    label = np.array([-1.0, 3.0, 2.0])  # of three pairs: the first response is better, then the second, twice
    attributes = torch.full((6, 5), NAN)
    attributes[:, 0] = torch.tensor(label.repeat(2))
    batch = LabeledPairs(**rows([2, 3, 4, 2, 5, 6]), attributes=attributes)
    first, second = outputs[::2, 4].numpy(), outputs[1::2, 4].numpy()
    margin = np.where(label < 0, first - second, second - first)
    found = means(AttributePairs(loss), outputs, batch)
    assert found["loss"] == pytest.approx(expected(margin, np.abs(label)).mean())
    assert found["acc"] == pytest.approx((margin > 0).mean())


def test_regression_counts_judged_attributes():
    outputs = torch.tensor([[1.0, 5.0], [2.0, 2.0], [7.0, 7.0]])
    attributes = torch.tensor([[3.0, NAN], [2.0, 5.0], [NAN, NAN]])
    found = means(Regression(), outputs, AttributeBatch(**rows([2, 3, 1]), attributes=attributes))
    assert found["loss"] == pytest.approx((4.0 + 0.0 + 9.0) / 3)
    assert found["rewards_all_mean"] == pytest.approx(5.0 / 3)


@pytest.mark.parametrize("kind", ["pairs", "labelled pairs", "regression"])
def test_gradients_and_cutting(kind: str):
    draw = torch.Generator().manual_seed(1)
    lengths = [2, 3, 4, 2, 1, 1, 5, 6]
    attributes = torch.randn(8, 3, generator=draw, dtype=torch.float64)
    attributes[1::2, 0] = attributes[::2, 0]
    attributes[2, 1] = attributes[4:6] = NAN
    batch: TokenBatch = AttributeBatch(**rows(lengths), attributes=attributes)
    objective: Objective = Regression()
    if kind == "pairs":
        batch, objective = PreferenceBatch(**rows(lengths), given_rewards=torch.zeros(8)), BradleyTerry()
    elif kind == "labelled pairs":
        batch = LabeledPairs(**rows(lengths), attributes=attributes)
        objective = AttributePairs("margin_bt")
    outputs = torch.randn(8, 3, generator=draw, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: objective(ModelOutput(rewards=x), batch)[0], outputs)
    whole = objective(ModelOutput(rewards=outputs), batch)
    parts = [
        objective(ModelOutput(rewards=rewards), part)
        for rewards, part in zip(outputs.split(2), batch.split(2), strict=True)
    ]
    assert sum(float(loss.detach()) for loss, _ in parts) == pytest.approx(float(whole[0].detach()))
    assert sum(int(part.count(objective.unit)) for part in batch.split(2)) == int(batch.count(objective.unit))
    for name, (total, count) in whole[1].items():
        assert sum(float(m[name][0]) for _, m in parts) == pytest.approx(float(total)), name
        assert sum(int(m[name][1]) for _, m in parts) == int(count), name


def test_a_sure_pair_costs_nothing_and_overflows_nowhere():
    chosen, rejected = torch.tensor([1e4, -1e4]), torch.tensor([-1e4, 1e4])
    assert bradley_terry(chosen, rejected).tolist() == [0.0, 2e4]


def test_merging_attributes():
    assert RegressionConfig(num_attributes=4).weights == [0.25] * 4
    with pytest.raises(UserError, match="num_attributes=0"):
        RegressionConfig(num_attributes=0).check()
