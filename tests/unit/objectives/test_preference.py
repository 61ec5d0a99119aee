# SPDX-License-Identifier: Apache-2.0
"""Losses of pairs against a reference: values worked by hand, gradients, and what padding must not change."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from nemo_aligner.batch import PreferenceBatch, ReferencedPairs, TokenBatch
from nemo_aligner.errors import UserError
from nemo_aligner.objectives.config import DPOConfig, PreferenceLoss
from nemo_aligner.objectives.preference import DPO, dpo, ipo
from nemo_aligner.objectives.preference_variants import orpo, robust_dpo, rpo, simpo
from nemo_aligner.objectives.protocol import ModelOutput

PLAIN = DPO(DPOConfig(ref_policy_kl_penalty=0.5))


def changed(**settings) -> DPO:
    return DPO(replace(PLAIN.config, **settings))


PAIR = [([1, 2, 3, 4], [False, False, True, True]), ([1, 2, 5, 6, 7], [False] * 2 + [True] * 3)]


def batch(*, padding: int = 0, pairs: int = 2) -> ReferencedPairs:
    """Pairs of responses of 2 and 3 tokens after a prompt of 2, and as many positions of padding."""
    whole = TokenBatch.from_rows(PAIR * pairs, pad_id=0, seq_length=5 + padding)
    rewards = torch.tensor([1.0, 0.0] * pairs)
    return whole.extended(
        ReferencedPairs, given_rewards=rewards, reference_sums=torch.tensor([-3.0, -4.0] * pairs)
    )


def output(rows: PreferenceBatch, *, chosen: float, rejected: float) -> ModelOutput:
    """Log-probs of each response that add up to these."""
    whole = torch.tensor([chosen, rejected]).repeat(rows.num_rows // 2)[:, None]
    return ModelOutput(logprobs=whole / rows.loss_lengths()[:, None] * rows.loss_mask)


@pytest.mark.parametrize(
    "objective", [PLAIN, changed(label_smoothing=0.3), changed(preference_loss="robust", label_smoothing=0.3)]
)
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
        # By default both parts are averaged, or none.
        (changed(preference_loss_weight=0.0, sft_loss_weight=1.0, preference_average_log_probs=True), 1.0),
        (changed(preference_loss_weight=0.0, sft_loss_weight=1.0), 2.0),
    ):
        loss, metrics = objective(given, rows)
        assert loss.item() == pytest.approx(expected, abs=1e-6), objective
        assert metrics["loss"][0] == loss
        assert set(metrics) == set(objective.metrics)
    assert metrics["rewards_chosen_mean"][0].item() == 0.5
    assert metrics["rewards_rejected_mean"][0].item() == -1.0


def test_losses_are_trls():
    """The formulas of TRL's trainers, which its own code worked out for these log-probs."""
    frozen = json.loads((Path(__file__).parents[2] / "fixtures/trl_pair_losses.json").read_text())
    policy, reference, lengths = (
        torch.tensor(frozen[name], dtype=torch.float64) for name in ("policy", "reference", "lengths")
    )
    beta, smoothing, gamma = (frozen[name] for name in ("beta", "label_smoothing", "simpo_gamma"))
    for name, found in (
        ("sigmoid", dpo(policy, reference, beta=beta)),
        ("robust", robust_dpo(policy, reference, beta=beta, label_smoothing=smoothing)),
        ("simpo", simpo(policy / lengths, beta=beta, gamma=gamma)),
        ("orpo", orpo(policy / lengths)),
    ):
        torch.testing.assert_close(found, torch.tensor(frozen[name], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("distance", ["rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl"])
def test_given_rewards_are_approached_as_numpy_has_it(distance: str):
    draw = np.random.default_rng(0)
    policy, reference, rewards = draw.normal(size=(3, 6, 2))
    implicit = 0.5 * (policy[:, 0] - reference[:, 0] - policy[:, 1] + reference[:, 1])
    given = 2.0 * (rewards[:, 0] - rewards[:, 1])
    ours, theirs = (np.stack([x, 1 - x]) for x in (1 / (1 + np.exp(-implicit)), 1 / (1 + np.exp(-given))))
    wanted = {
        "rpo_sq": (implicit - given) ** 2,
        "rpo_bwd_kl": (theirs * np.log(theirs / ours)).sum(0),
        "rpo_fwd_kl": (ours * np.log(ours / theirs)).sum(0),
    }[distance]
    tensors = (torch.tensor(x) for x in (policy, reference, rewards))
    found = rpo(*tensors, beta=0.5, scale=2.0, distance=distance)
    torch.testing.assert_close(found, torch.tensor(wanted))


def test_a_margin_that_is_the_given_one_costs_nothing():
    rows = replace(batch(pairs=1), given_rewards=torch.tensor([4.0, 2.5]))
    given = output(rows, chosen=-2.0, rejected=-6.0)  # an implicit margin of 1.5
    for name in ("rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl"):
        loss, _ = changed(preference_loss=name)(given, rows)
        assert loss.item() == pytest.approx(0, abs=1e-6)
        loss, _ = changed(preference_loss=name, gt_reward_scale=2.0)(given, rows)
        assert loss.item() > 0.05


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_without_a_reference_mean_log_probs_count(name: str):
    rows = TokenBatch.from_rows(PAIR, pad_id=0, seq_length=5)
    rows = rows.extended(PreferenceBatch, given_rewards=torch.tensor([1.0, 0.0]))
    given = output(rows, chosen=-2.0, rejected=-6.0)  # means of -1 and -2
    loss, metrics = changed(preference_loss=name)(given, rows)
    log_odds = math.log(math.exp(-1) / (1 - math.exp(-1))) - math.log(math.exp(-2) / (1 - math.exp(-2)))
    margin = {"simpo": 0.5 * (-1 + 2) - 0.5, "orpo": log_odds}[name]
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-margin)), abs=1e-6)
    assert metrics["rewards_chosen_mean"][0] == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("loss", "setting"), [("ipo", "label_smoothing"), ("dpo", "gt_reward_scale"), ("orpo", "simpo_gamma")]
)
def test_a_setting_of_another_loss_is_refused(loss: str, setting: str):
    with pytest.raises(UserError, match=rf"{setting}=0.1 has no effect with .*={loss}: only "):
        DPOConfig(preference_loss=loss, **{setting: 0.1})


def test_a_loss_without_weight_is_refused():
    with pytest.raises(UserError, match="there is no loss"):
        DPOConfig(preference_loss_weight=0.0)


@pytest.mark.parametrize("name", get_args(PreferenceLoss))
def test_padding_changes_nothing(name: str):
    few, many = batch(pairs=1), batch(pairs=1, padding=3).pad_rows(4)
    many = replace(many, reference_sums=torch.tensor([-3.0, -4.0, 9.0, -9.0]))
    few, many = (replace(rows, given_rewards=torch.arange(float(rows.num_rows))) for rows in (few, many))
    objective = changed(preference_loss=name, sft_loss_weight=1.0)
    whole, metrics = objective(output(few, chosen=-2.0, rejected=-6.0), few)
    logprobs = torch.where(many.loss_mask, output(many, chosen=-2.0, rejected=-6.0).logprobs, 0.0)
    logprobs.requires_grad_()
    padded, found = objective(ModelOutput(logprobs=logprobs), many)
    torch.testing.assert_close(padded, whole)
    padded.backward()
    assert logprobs.grad.isfinite().all()
    for name, pair in metrics.items():
        torch.testing.assert_close(torch.stack([*map(torch.as_tensor, found[name])]).double(),
                                   torch.stack([*map(torch.as_tensor, pair)]).double())  # fmt: skip


def test_gradients():
    pairs = torch.linspace(-3, 3, 8, dtype=torch.float64).view(4, 2).requires_grad_()
    reference = torch.linspace(1, -2, 8, dtype=torch.float64).view(4, 2)
    assert torch.autograd.gradcheck(lambda x: dpo(x, reference, beta=0.5, label_smoothing=0.2), pairs)
    assert torch.autograd.gradcheck(lambda x: ipo(x, reference, beta=0.3), pairs)
    assert torch.autograd.gradcheck(lambda x: robust_dpo(x, reference, beta=0.5, label_smoothing=0.2), pairs)
    for name in ("rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl"):
        distance = partial(rpo, reference=reference, rewards=reference, beta=0.5, scale=0.7, distance=name)
        assert torch.autograd.gradcheck(distance, pairs)
    assert torch.autograd.gradcheck(lambda x: simpo(x, beta=2.0, gamma=0.5), pairs)
    assert torch.autograd.gradcheck(lambda x: orpo(x - 4), pairs)
    rows = batch()
    logprobs = torch.randn(rows.tokens.shape, dtype=torch.float64, requires_grad=True)
    objective = changed(sft_loss_weight=0.5, preference_average_log_probs=True)
    assert torch.autograd.gradcheck(lambda x: objective(ModelOutput(logprobs=x), rows)[0], logprobs)
    objective(ModelOutput(logprobs=logprobs), rows)[0].backward()
    assert not logprobs.grad[~rows.loss_mask].any()
    assert (logprobs.grad[::2][rows.loss_mask[::2]] < 0).all(), "the chosen response becomes more likely"
