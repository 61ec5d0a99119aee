# SPDX-License-Identifier: Apache-2.0
"""Losses of pairs against a reference: values worked by hand, gradients, and what padding must not change."""

import math
from dataclasses import replace

import pytest
import torch

from nemo_aligner.batch import ReferencedPairs, TokenBatch
from nemo_aligner.objectives.config import DPOConfig
from nemo_aligner.objectives.preference import DPO, dpo, ipo
from nemo_aligner.objectives.protocol import ModelOutput

PLAIN = DPO(DPOConfig(ref_policy_kl_penalty=0.5))


def changed(**settings) -> DPO:
    return DPO(replace(PLAIN.config, **settings))


def batch(*, padding: int = 0, pairs: int = 2) -> ReferencedPairs:
    """Pairs of responses of 2 and 3 tokens after a prompt of 2, and as many positions of padding."""
    rows = [([1, 2, 3, 4], [False, False, True, True]), ([1, 2, 5, 6, 7], [False] * 2 + [True] * 3)] * pairs
    whole = TokenBatch.from_rows(rows, pad_id=0, seq_length=5 + padding)
    return whole.extended(ReferencedPairs, reference_sums=torch.tensor([-3.0, -4.0] * pairs))


def output(rows: ReferencedPairs, *, chosen: float, rejected: float) -> ModelOutput:
    """Log-probs of each response that add up to these."""
    whole = torch.tensor([chosen, rejected]).repeat(rows.num_rows // 2)[:, None]
    return ModelOutput(logprobs=whole / rows.loss_lengths()[:, None] * rows.loss_mask)


@pytest.mark.parametrize("objective", [PLAIN, changed(label_smoothing=0.3)])
def test_a_policy_that_is_the_reference_starts_at_ln_2(objective):
    rows = batch()
    loss, metrics = objective(output(rows, chosen=-3.0, rejected=-4.0), rows)
    assert loss.item() == pytest.approx(2 * math.log(2), abs=1e-6)
    assert metrics["rewards_all_mean"][0] == 0


def test_values_worked_by_hand():
    rows = batch(pairs=1)
    given = output(rows, chosen=-2.0, rejected=-6.0)  # rewards 0.5 and -1: a margin of 1.5
    for objective, expected in (
        (PLAIN, math.log(1 + math.exp(-1.5))),
        (changed(label_smoothing=0.1), math.log(1 + math.exp(-1.5)) + 0.1 * 1.5),
        (changed(preference_loss="ipo"), (3.0 - 1.0) ** 2),
        (changed(preference_loss="ipo", preference_average_log_probs=True), (1 / 2 + 2 / 3 - 1) ** 2),
        (changed(sft_loss_weight=2.0), math.log(1 + math.exp(-1.5)) + 2.0 * 2),
        (changed(sft_loss_weight=2.0, sft_average_log_probs=True), math.log(1 + math.exp(-1.5)) + 2.0),
        (changed(preference_loss_weight=0.0, sft_loss_weight=1.0), 2.0),
    ):
        loss, metrics = objective(given, rows)
        assert loss.item() == pytest.approx(expected, abs=1e-6), objective
        assert metrics["loss"][0] == loss
        assert set(metrics) == set(objective.metrics)
    assert metrics["rewards_chosen_mean"][0].item() == 0.5
    assert metrics["rewards_rejected_mean"][0].item() == -1.0


def test_padding_changes_nothing():
    few, many = batch(pairs=1), batch(pairs=1, padding=3).pad_rows(4)
    many = replace(many, reference_sums=torch.tensor([-3.0, -4.0, 9.0, -9.0]))
    objective = changed(sft_loss_weight=1.0)
    whole, metrics = objective(output(few, chosen=-2.0, rejected=-6.0), few)
    logprobs = torch.where(many.loss_mask, output(many, chosen=-2.0, rejected=-6.0).logprobs, 0.0)
    padded, found = objective(ModelOutput(logprobs=logprobs), many)
    torch.testing.assert_close(padded, whole)
    for name, pair in metrics.items():
        torch.testing.assert_close(torch.stack([*map(torch.as_tensor, found[name])]).double(),
                                   torch.stack([*map(torch.as_tensor, pair)]).double())  # fmt: skip


def test_gradients():
    pairs = torch.linspace(-3, 3, 8, dtype=torch.float64).view(4, 2).requires_grad_()
    reference = torch.linspace(1, -2, 8, dtype=torch.float64).view(4, 2)
    assert torch.autograd.gradcheck(lambda x: dpo(x, reference, beta=0.5, label_smoothing=0.2), pairs)
    assert torch.autograd.gradcheck(lambda x: ipo(x, reference, beta=0.3), pairs)
    rows = batch()
    logprobs = torch.randn(rows.tokens.shape, dtype=torch.float64, requires_grad=True)
    objective = changed(sft_loss_weight=0.5, preference_average_log_probs=True)
    assert torch.autograd.gradcheck(lambda x: objective(ModelOutput(logprobs=x), rows)[0], logprobs)
    objective(ModelOutput(logprobs=logprobs), rows)[0].backward()
    assert not logprobs.grad[~rows.loss_mask].any()
    assert (logprobs.grad[::2][rows.loss_mask[::2]] < 0).all(), "the chosen response becomes more likely"
