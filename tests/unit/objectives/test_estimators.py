# SPDX-License-Identifier: Apache-2.0
"""Advantages without a critic against numpy's float64, and what must not change them."""

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from nemo_aligner.errors import UserError
from nemo_aligner.objectives.config import GROUPED, CreditConfig, Estimator
from nemo_aligner.objectives.credit import (
    best_of_n,
    credit,
    group_advantages,
    leave_one_out,
    sampler_weights,
    teacher_advantages,
)
from nemo_aligner.objectives.policy import PolicyGradient
from nemo_aligner.objectives.protocol import ModelOutput
from nemo_aligner.rollout_batch import Experience, ScoredRollout

REWARDS = torch.tensor([1.0, 4.0, 2.5, -3.0, 0.0, 7.0, 7.0, 7.0], dtype=torch.float64)
GROUPS = torch.tensor([5, 2, 5, 2, 2, 9, 9, 9])  # of 2, 3 and 3; the last has equal rewards


def by_hand(name: str, *, std: bool = True) -> np.ndarray:
    rewards, found = REWARDS.numpy(), np.zeros(8)
    for row, reward in enumerate(rewards):
        others = [r for i, r in enumerate(rewards) if GROUPS[i] == GROUPS[row]]
        if name == "leave_one_out":
            rest = [r for i, r in enumerate(rewards) if GROUPS[i] == GROUPS[row] and i != row]
            found[row] = reward - np.mean(rest)
        else:
            found[row] = (reward - np.mean(others)) / (np.std(others, ddof=1) + 1e-6 if std else 1.0)
    return found


def test_against_numpy():
    for std in (True, False):
        found = group_advantages(REWARDS, GROUPS, divide_by_std=std)
        np.testing.assert_allclose(found, by_hand("group", std=std), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(leave_one_out(REWARDS, GROUPS), by_hand("leave_one_out"), rtol=1e-12)
    assert best_of_n(REWARDS, GROUPS).tolist() == [False, True, True, False, False, True, False, False]


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_the_best_of_each_group_are_kept(keep: int):
    """Of equal rewards the first; all of a group that has fewer."""
    rewards = torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0, -1.0, -2.0])
    group = torch.tensor([0, 0, 5, 0, 0, 5, 5])
    wanted = [False] * 7
    for number in (0, 5):
        rows = [row for row in range(7) if group[row] == number]
        for row in sorted(rows, key=lambda row: -float(rewards[row]))[:keep]:
            wanted[row] = True
    assert best_of_n(rewards, group, keep=keep).tolist() == wanted


@pytest.mark.parametrize("shift", [3.0, -100.0])
def test_a_constant_more_for_every_response_changes_nothing(shift: float):
    for std in (True, False):
        found = group_advantages(REWARDS + shift, GROUPS, divide_by_std=std)
        torch.testing.assert_close(found, group_advantages(REWARDS, GROUPS, divide_by_std=std))
    torch.testing.assert_close(leave_one_out(REWARDS + shift, GROUPS), leave_one_out(REWARDS, GROUPS))
    assert torch.equal(best_of_n(REWARDS + shift, GROUPS), best_of_n(REWARDS, GROUPS))


def test_the_order_of_rows_does_not_matter():
    order = torch.tensor([3, 1, 4, 0, 7, 2, 6, 5])
    torch.testing.assert_close(
        group_advantages(REWARDS[order], GROUPS[order], divide_by_std=True),
        group_advantages(REWARDS, GROUPS, divide_by_std=True)[order],
    )
    torch.testing.assert_close(
        leave_one_out(REWARDS[order], GROUPS[order]), leave_one_out(REWARDS, GROUPS)[order]
    )


def grouped(scored: Callable[..., ScoredRollout]) -> ScoredRollout:
    return replace(scored(), group=torch.tensor([0, 0, 1, 1]), values=torch.zeros_like(scored().values))


def credited(batch: ScoredRollout, name: Estimator, **changed: object) -> Experience:
    config = CreditConfig(advantage_estimator=name, mask_unfinished=False, **changed)
    return credit(batch, config, kl_coefficient=0.0)


@pytest.mark.parametrize("name", GROUPED)
def test_each_token_of_a_response_has_its_advantage(scored: Callable[..., ScoredRollout], name: Estimator):
    batch = grouped(scored)
    experience, responses = credited(batch, name), batch.loss_tokens()
    match name:
        case "group":
            each = group_advantages(batch.rewards, batch.group, divide_by_std=True)
        case "leave_one_out":
            each = leave_one_out(batch.rewards, batch.group)
        case _:
            each = torch.ones(4)
    assert torch.equal(
        experience.advantages[responses & experience.loss_mask],
        each[:, None]
        .expand(responses.shape)[responses & experience.loss_mask]
        .to(experience.advantages.dtype),
    )
    assert not experience.advantages[~responses].any()
    learned = experience.loss_tokens().any(1).tolist()
    assert learned == ([True, False, True, False] if name == "best_of_n" else [True] * 4)


def test_reinforce_sums_what_follows(scored: Callable[..., ScoredRollout]):
    batch = grouped(scored)
    experience = credited(batch, "reinforce", discount_factor=0.5, normalize_advantages=False)
    for row in range(4):
        mine = experience.advantages[row][batch.loss_mask[row]]
        powers = 0.5 ** torch.arange(len(mine) - 1, -1, -1, dtype=mine.dtype)
        torch.testing.assert_close(mine, batch.rewards[row] * powers)


@pytest.mark.parametrize("name", get_args(Estimator))
def test_whitening_follows_the_estimator_unless_it_is_set(name: Estimator):
    assert CreditConfig(advantage_estimator=name).whitens == (name in ("gae", "reinforce"))
    for asked in (True, False):
        assert CreditConfig(advantage_estimator=name, normalize_advantages=asked).whitens == asked


def test_a_kl_in_the_loss_is_no_part_of_the_reward(scored: Callable[..., ScoredRollout]):
    batch = grouped(scored)
    config = CreditConfig(advantage_estimator="group", kl_placement="loss", mask_unfinished=False)
    assert torch.equal(
        credit(batch, config, kl_coefficient=0.3).advantages, credited(batch, "group").advantages
    )


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
def test_a_kl_in_the_loss_against_numpy(scored: Callable[..., ScoredRollout], estimator: str):
    experience = credited(grouped(scored), "group")
    now = (experience.logprobs + 0.1 * torch.sin(experience.logprobs)).requires_grad_()
    plain, _ = PolicyGradient()(ModelOutput(logprobs=now), experience)
    objective = PolicyGradient(kl_coefficient=0.3, kl_estimator=estimator)
    loss, metrics = objective(ModelOutput(logprobs=now), experience)
    learned = experience.loss_tokens()
    p, q = (x.detach()[learned].numpy() for x in (now, experience.reference_logprobs))
    each = {"k1": p - q, "abs": np.abs(p - q), "k2": (p - q) ** 2 / 2, "k3": np.exp(q - p) - 1 - (q - p)}[
        estimator
    ]
    assert (loss - plain).item() == pytest.approx(0.3 * each.sum(), rel=1e-9)
    assert metrics["scaled_kl"][0].item() == pytest.approx(0.3 * each.sum(), rel=1e-9)
    assert set(metrics) == set(objective.metrics)
    assert torch.autograd.gradcheck(
        lambda x: objective(ModelOutput(logprobs=x), experience)[0], (now.detach().requires_grad_(),)
    )


def test_an_adaptive_kl_in_the_loss_is_refused():
    with pytest.raises(UserError, match=r"adaptive_kl_target=0\.1 steers a penalty in the reward"):
        CreditConfig(adaptive_kl_target=0.1, kl_placement="loss").check("trainer.ppo")


def test_settings_of_a_penalty_that_is_not_there_are_known():
    assert CreditConfig(initial_policy_kl_penalty=0.0).idle == []
    asked = CreditConfig(initial_policy_kl_penalty=0.0, kl_estimator="k3", adaptive_kl_horizon=5.0)
    assert asked.idle == ["kl_estimator", "adaptive_kl_horizon"]
    assert replace(asked, initial_policy_kl_penalty=0.1).idle == []


def test_a_teacher_credits_tokens_by_minus_the_gradient_of_the_reverse_kl():
    """Over all tokens of a vocabulary, ``sum_y p(y) A(y) grad log p(y)`` is autograd's ``-grad KL(p || q)``."""
    draw = torch.Generator().manual_seed(3)
    logits, teacher = (torch.randn(7, generator=draw, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    logprobs, known = logits.log_softmax(0), teacher.log_softmax(0)
    (wanted,) = torch.autograd.grad((logprobs.exp() * (logprobs - known)).sum(), logits, retain_graph=True)
    advantages = teacher_advantages(logprobs.detach()[None], known[None])[0]
    surrogate = (logprobs.detach().exp() * advantages * logprobs).sum()
    torch.testing.assert_close(torch.autograd.grad(surrogate, logits)[0], -wanted)


def test_a_teacher_is_no_reward(scored: Callable[..., ScoredRollout]):
    """Rewards and what follows a token do not count; nothing is whitened."""
    batch = grouped(scored)
    experience, responses = credited(batch, "teacher"), batch.loss_tokens()
    apart = (batch.reference_logprobs - batch.logprobs)[responses]
    assert torch.equal(experience.advantages[responses], apart)
    assert not experience.advantages[~responses].any()
    other = credited(replace(batch, rewards=batch.rewards + 5), "teacher")
    assert torch.equal(other.advantages, experience.advantages)


def test_what_another_sampler_drew_is_weighed_to_the_policys_own_gradient():
    """Over a whole vocabulary, ``sum_y q(y) w(y) A(y) grad log p(y)`` is the gradient of ``sum_y p(y) A(y)``."""
    draw = torch.Generator().manual_seed(3)
    logits, sampler, gain = (torch.randn(7, generator=draw, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_()
    logprobs, drawn = logits.log_softmax(0), sampler.log_softmax(0)
    (wanted,) = torch.autograd.grad((logprobs.exp() * gain).sum(), logits, retain_graph=True)
    config = CreditConfig(sampler_correction="truncate", sampler_ratio_high=1e6)
    weights = sampler_weights(logprobs.detach(), drawn, config)
    surrogate = (drawn.exp() * weights * gain * logprobs).sum()
    torch.testing.assert_close(torch.autograd.grad(surrogate, logits)[0], wanted)


@pytest.mark.parametrize("correction", ["truncate", "mask"])
def test_advantages_are_corrected_after_whitening(scored: Callable[..., ScoredRollout], correction: str):
    batch = grouped(scored)
    rows, places = (torch.arange(n) for n in batch.tokens.shape)
    shift = 0.4 * torch.sin(3.0 * rows[:, None] + places).to(batch.logprobs.dtype)
    batch = replace(batch, sampler_logprobs=batch.logprobs - shift)
    plain = credited(batch, "group", normalize_advantages=True)
    bounds = {"sampler_ratio_low": 0.8, "sampler_ratio_high": 1.25}
    if correction == "truncate":
        del bounds["sampler_ratio_low"]
    found = credited(batch, "group", normalize_advantages=True, sampler_correction=correction, **bounds)
    ratio = np.exp(shift.numpy())
    inside = (ratio >= 0.8) & (ratio <= 1.25)
    weights = np.minimum(ratio, 1.25) if correction == "truncate" else np.where(inside, ratio, 0)
    responses = batch.loss_tokens().numpy()
    assert 0 < inside[responses].mean() < 1
    np.testing.assert_allclose(
        found.advantages, np.where(responses, plain.advantages * weights, 0), rtol=1e-6
    )
    assert torch.equal(found.returns, plain.returns)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sampler_ratio_high": 3.0}, "sampler_ratio_high=3.0 has no effect"),
        ({"sampler_ratio_low": 0.1, "sampler_correction": "truncate"}, "sampler_ratio_low=0.1 has no effect"),
        ({"sampler_ratio_high": 0.9, "sampler_correction": "mask"}, "sampler_ratio_high=0.9"),
    ],
)
def test_bounds_that_nothing_reads_are_refused(settings: dict[str, object], says: str):
    with pytest.raises(UserError, match=says):
        CreditConfig(**settings).check("trainer.ppo")
