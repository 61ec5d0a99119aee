# SPDX-License-Identifier: Apache-2.0
"""Kahneman-Tversky optimization: values worked by hand and by numpy, gradients, and what padding must not change."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_aligner.batch import RatedResponses, TokenBatch
from nemo_aligner.objectives.kto import KTO, kto
from nemo_aligner.objectives.protocol import ModelOutput

EVEN = KTO()


def batch(*, padding_rows: int = 0) -> RatedResponses:
    """A good response of 2 tokens and a bad one of 3, after a prompt of 2; reference sums of -3 and -4, a KL of 0.5."""
    rows = [([1, 2, 3, 4], [False, False, True, True]), ([1, 2, 5, 6, 7], [False] * 2 + [True] * 3)]
    rows += [([0], [False])] * padding_rows
    count = len(rows)
    return TokenBatch.from_rows(rows, pad_id=0, seq_length=6).extended(
        RatedResponses,
        good=torch.tensor([True, False, True, False])[:count],
        reference_sums=torch.tensor([-3.0, -4.0, 9.0, 9.0])[:count],
        kl_baseline=torch.full((count,), 0.5),
    )


def output(rows: TokenBatch) -> ModelOutput:
    """Log-probs of the two responses that add up to -2 and -6."""
    sums = torch.tensor([-2.0, -6.0, 0.0, 0.0])[: rows.num_rows, None]
    return ModelOutput(logprobs=sums / rows.loss_lengths().clamp(min=1)[:, None] * rows.loss_mask)


def test_values_worked_by_hand():
    rows = batch()
    objective = KTO(beta=2.0, good_weight=3.0, bad_weight=0.5)
    loss, metrics = objective(output(rows), rows)
    # Rewards of 1 and -2 nats, beside 0.5: sigmoid(2 * 0.5) and sigmoid(2 * 2.5) are what is gained.
    expected = 3 * (1 - 1 / (1 + np.exp(-1.0))) + 0.5 * (1 - 1 / (1 + np.exp(-5.0)))
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert {name: (float(total), int(count)) for name, (total, count) in metrics.items()} == {
        "loss": (pytest.approx(expected, abs=1e-6), 2),
        "kl": (1.0, 2),
        "rewards_chosen_mean": (2.0, 1),
        "rewards_rejected_mean": (-4.0, 1),
    }
    assert set(metrics) == set(objective.metrics)


def test_losses_are_trls():
    """The formula of TRL's KTOTrainer, which its own code worked out for these log-probs."""
    frozen = json.loads((Path(__file__).parents[2] / "fixtures/trl_pair_losses.json").read_text())
    policy, reference = (torch.tensor(frozen[name], dtype=torch.float64) for name in ("policy", "reference"))
    theirs = frozen["kto"]
    reward = (policy - reference).t().flatten()
    good = torch.arange(reward.numel()) < len(policy)
    losses = kto(reward, torch.full_like(reward, theirs["kl"]), good, beta=frozen["beta"])
    losses = losses * torch.where(good, theirs["desirable_weight"], theirs["undesirable_weight"])
    wanted = torch.tensor(theirs["losses, good then bad"], dtype=torch.float64)
    torch.testing.assert_close(losses, wanted, rtol=0, atol=1e-6)


def test_a_policy_that_is_the_reference_costs_a_half():
    zero = torch.zeros(4)
    assert kto(zero, zero, zero > 0, beta=0.7).tolist() == [0.5] * 4


def test_padding_changes_nothing():
    found = [EVEN(output(rows), rows) for rows in (batch(), batch(padding_rows=2))]
    torch.testing.assert_close(found[0][0], found[1][0])
    for name, (total, count) in found[0][1].items():
        assert (float(total), int(count)) == tuple(map(float, found[1][1][name])), name


def test_gradients():
    rewards = torch.linspace(-3, 3, 6, dtype=torch.float64, requires_grad=True)
    good = torch.tensor([True, False] * 3)
    baseline = torch.full((6,), 0.3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: kto(x, baseline, good, beta=0.6), rewards)
    kto(rewards, baseline, good, beta=0.6).sum().backward()
    assert ((rewards.grad < 0) == good).all(), "good responses become more likely"
