# SPDX-License-Identifier: Apache-2.0
"""Credit against values worked out by hand, the published sums and loops in numpy's float64."""

from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from nemo_aligner.batch import Unit
from nemo_aligner.errors import UserError
from nemo_aligner.objectives.adaptive import KLController, RewardScaling
from nemo_aligner.objectives.config import CreditConfig
from nemo_aligner.objectives.credit import (
    credit,
    gae,
    kl_controller,
    rolling_returns,
    shape_rewards,
    statistics,
    update_reward_scaling,
    value_batch,
)
from nemo_aligner.objectives.policy import PolicyGradient
from nemo_aligner.objectives.protocol import ModelOutput
from nemo_aligner.objectives.reduce import Moments
from nemo_aligner.objectives.value import ValueLoss
from nemo_aligner.rollout_batch import ScoredRollout

Make = Callable[..., ScoredRollout]


def response(batch: ScoredRollout, name: str, row: int) -> np.ndarray:
    """What one row's answer has of a field: [tokens of the response]."""
    return getattr(batch, name)[row, int(batch.prompt_lengths[row]) : int(batch.lengths[row])].numpy()


def taken(batch: ScoredRollout, rows: torch.Tensor) -> ScoredRollout:
    """These rows of a batch."""
    return replace(
        batch, **{f.name: getattr(batch, f.name)[rows] for f in fields(batch) if f.name != "cu_seqlens"}
    )


def in_output_positions(batch: ScoredRollout, beta: float) -> dict[str, np.ndarray]:
    """PPO's data in the layout [B, S - 1], where position t speaks of token t + 1, loop by loop."""
    logprobs, reference, values = (
        getattr(batch, name).numpy()[:, 1:].copy() for name in ("logprobs", "reference_logprobs", "values")
    )
    mask, rewards = np.zeros_like(values), np.zeros_like(values)
    for i in range(len(values)):
        prompt, length = int(batch.prompt_lengths[i]), int(batch.lengths[i])
        mask[i, prompt - 1 : length - 1] = 1
        rewards[i, length - 2] = float(batch.rewards[i])
    rewards = (rewards - beta * np.abs(logprobs - reference)) * mask
    values = values * mask
    advantages, last = np.zeros_like(values), np.zeros(len(values))
    for t in reversed(range(values.shape[1])):
        after = values[:, t + 1] if t + 1 < values.shape[1] else 0.0
        last = rewards[:, t] + after - values[:, t] + 0.95 * last
        advantages[:, t] = last
    returns = advantages + values
    chosen = advantages[mask > 0]
    white = (advantages - chosen.mean()) / np.sqrt(np.mean((chosen - chosen.mean()) ** 2) + 1e-8)
    return {"advantages": white, "returns": returns, "values": values, "loss_mask": mask}


def test_the_defaults_are_the_reference_formulas(scored: Make):
    batch = scored()
    expected = in_output_positions(batch, 0.01)
    config = CreditConfig()
    experience = credit(batch, config, kl_coefficient=config.initial_policy_kl_penalty)
    inside = expected["loss_mask"] > 0
    for name in ("advantages", "returns", "values"):
        found = getattr(experience, name).numpy()
        np.testing.assert_allclose(found[:, 1:][inside], expected[name][inside], rtol=1e-12, atol=1e-13)
        assert not found[:, 0].any()
        assert not found[:, 1:][~inside].any()
    ended = expected["loss_mask"] * batch.finished.numpy()[:, None]
    np.testing.assert_array_equal(experience.loss_mask.numpy()[:, 1:], ended > 0)
    critic = value_batch(batch, experience)
    np.testing.assert_array_equal(critic.loss_mask.numpy()[:, 1:], inside)


def test_both_losses_of_the_defaults_are_the_reference_formulas(scored: Make):
    batch = scored()
    expected = in_output_positions(batch, 0.01)
    experience = credit(batch, CreditConfig(), kl_coefficient=0.01)
    draw = torch.Generator().manual_seed(9)
    now = batch.logprobs + 0.3 * torch.randn(batch.loss_mask.shape, generator=draw, dtype=torch.float64)
    values = batch.values + 0.3 * torch.randn(batch.loss_mask.shape, generator=draw, dtype=torch.float64)

    ratio = np.exp(now.numpy() - batch.logprobs.numpy())[:, 1:]
    advantages = expected["advantages"]
    surrogate = np.maximum(-advantages * ratio, -advantages * np.clip(ratio, 0.8, 1.2))
    weight = expected["loss_mask"] * batch.finished.numpy()[:, None]
    loss, _ = PolicyGradient()(ModelOutput(logprobs=now), experience)
    mean = loss.item() / experience.count(Unit.TOKEN).item()
    assert mean == pytest.approx((surrogate * weight).sum() / weight.sum(), rel=1e-12)

    v, old, target = values.numpy()[:, 1:], expected["values"], expected["returns"]
    clipped = old + np.clip(v - old, -0.2, 0.2)
    error = 0.5 * np.maximum((clipped - target) ** 2, (v - target) ** 2)
    critic = value_batch(batch, experience)
    loss, _ = ValueLoss()(ModelOutput(values=values), critic)
    mean = loss.item() / critic.count(Unit.TOKEN).item()
    assert mean == pytest.approx(np.average(error, weights=expected["loss_mask"]), rel=1e-12)


def test_gae_by_hand():
    values, rewards = torch.tensor([[9.0, 1.0, 2.0, 4.0, 9.0]]), torch.tensor([[9.0, 0.5, 0.0, 8.0, 9.0]])
    mask = torch.tensor([[False, True, True, True, False]])
    advantages, returns = gae(values, rewards, mask, gamma=0.5, lam=0.5)
    # delta: 8 - 4 = 4;  0 + 0.5 * 4 - 2 = 0;  0.5 + 0.5 * 2 - 1 = 0.5
    assert advantages.tolist() == [[0, 0.5 + 0.25 * 1, 0 + 0.25 * 4, 4, 0]]
    assert returns.tolist() == [[0, 1.75, 3, 8, 0]]


@pytest.mark.parametrize("gamma", [1.0, 0.97, 0.0])
@pytest.mark.parametrize("lam", [0.95, 1.0, 0.0])
def test_gae_is_the_published_sum(scored: Make, gamma: float, lam: float):
    batch = scored()
    rewards = torch.randn(batch.values.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    advantages, returns = gae(batch.values, rewards, batch.loss_mask, gamma=gamma, lam=lam)
    for row in range(len(batch.lengths)):
        v = np.append(response(batch, "values", row), 0)
        start, end = int(batch.prompt_lengths[row]), int(batch.lengths[row])
        r = rewards[row, start:end].numpy()
        delta = r + gamma * v[1:] - v[:-1]
        for t in range(len(r)):
            expected = sum((gamma * lam) ** k * delta[t + k] for k in range(len(r) - t))
            assert advantages[row, start + t].item() == pytest.approx(expected, rel=1e-12, abs=1e-14)
            assert returns[row, start + t].item() == pytest.approx(expected + v[t], rel=1e-12, abs=1e-14)
    assert not advantages[~batch.loss_mask].any()
    assert not returns[~batch.loss_mask].any()


def test_a_response_in_two_parts_is_credited_as_if_nothing_stood_between():
    draw = torch.Generator().manual_seed(0)
    values, rewards = torch.randn(2, 1, 5, generator=draw, dtype=torch.float64)
    whole = torch.ones(1, 5, dtype=torch.bool)
    at = torch.tensor([1, 2, 5, 6, 8])
    spread = [
        torch.full((1, 10), float("nan"), dtype=torch.float64).index_copy(1, at, x) for x in (values, rewards)
    ]
    mask = torch.zeros(1, 10, dtype=torch.bool).index_fill(1, at, True)
    expected = gae(values, rewards, whole, gamma=0.9, lam=0.8)
    for found, closed in zip(gae(*spread, mask, gamma=0.9, lam=0.8), expected, strict=True):
        assert torch.equal(found[:, at], closed)


@pytest.mark.parametrize(
    ("config", "penalty"),
    [
        (CreditConfig(), lambda p, q: np.abs(p - q)),
        (CreditConfig(use_absolute_kl=False), lambda p, q: p - q),
        (CreditConfig(kl_estimator="k2"), lambda p, q: (p - q) ** 2 / 2),
        (CreditConfig(kl_estimator="k3"), lambda p, q: np.exp(q - p) - 1 - (q - p)),
    ],
)
@pytest.mark.parametrize("placement", ["token", "last"])
def test_the_kl_penalty(scored: Make, config: CreditConfig, penalty: Callable, placement: str):
    batch = scored()
    shaped = shape_rewards(batch, replace(config, kl_placement=placement), kl_coefficient=0.3)
    for row in range(len(batch.lengths)):
        kl = penalty(response(batch, "logprobs", row), response(batch, "reference_logprobs", row))
        expected = -0.3 * (kl if placement == "token" else np.append(np.zeros(len(kl) - 1), kl.sum()))
        expected[-1] += float(batch.rewards[row])
        start, end = int(batch.prompt_lengths[row]), int(batch.lengths[row])
        np.testing.assert_allclose(shaped[row, start:end], expected, rtol=1e-12, atol=1e-14)
    assert not shaped[~batch.loss_mask].any()


def test_without_a_penalty_the_initial_policy_is_not_read(scored: Make):
    batch = scored()
    unknown = replace(batch, reference_logprobs=torch.full_like(batch.logprobs, float("nan")))
    shaped = shape_rewards(unknown, CreditConfig(), kl_coefficient=0.0)
    assert shaped[shaped != 0].tolist() == batch.rewards.tolist()
    experience = credit(batch, CreditConfig(), kl_coefficient=0.0)
    logged = statistics(unknown, experience, CreditConfig(), kl_coefficient=0.0)
    assert (logged["init_policy_kl"].mean, logged["answer_kl"].mean) == (0, 0)


def test_a_responses_reward_is_clipped_before_the_penalty(scored: Make):
    batch = scored()
    config = CreditConfig(reward_clip=1.0)
    shaped = shape_rewards(batch, config, kl_coefficient=100.0)
    free = shape_rewards(batch, CreditConfig(), kl_coefficient=100.0)
    lost = (free - shaped).sum(1)
    torch.testing.assert_close(lost, torch.tensor([0.5, 0.0, 11.0, 0.0], dtype=torch.float64))
    assert shaped.min() < -50


def test_rewards_are_scaled_by_the_spread_of_their_rolling_sums(scored: Make):
    batch = scored()
    config = CreditConfig(scale_rewards=True, discount_factor=0.9, normalize_advantages=False)
    seen: list[float] = []
    scaling = RewardScaling()
    for beta in (0.1, 0.2):  # two rollouts: what was seen in the first counts in the second
        scaling = update_reward_scaling(scaling, batch, config, kl_coefficient=beta)
        shaped = shape_rewards(batch, config, kl_coefficient=beta)
        for row in range(len(batch.lengths)):
            rolling = 0.0
            for t in range(int(batch.prompt_lengths[row]), int(batch.lengths[row])):
                rolling = 0.9 * rolling + float(shaped[row, t])
                seen.append(rolling)
        assert scaling.divisor == pytest.approx(np.std(seen), rel=1e-12)
    found = credit(batch, config, kl_coefficient=0.2, scaling=scaling)
    expected, _ = gae(batch.values, shaped / np.std(seen), batch.loss_mask, gamma=0.9, lam=0.95)
    torch.testing.assert_close(found.advantages, expected, rtol=1e-12, atol=1e-13)
    clipped = credit(batch, replace(config, scaled_reward_clip=0.5), kl_coefficient=0.2, scaling=scaling)
    expected, _ = gae(
        batch.values, (shaped / np.std(seen)).clamp(-0.5, 0.5), batch.loss_mask, gamma=0.9, lam=0.95
    )
    torch.testing.assert_close(clipped.advantages, expected, rtol=1e-12, atol=1e-13)


def test_rewards_that_are_not_scaled_leave_the_scaling_alone(scored: Make):
    scaling = RewardScaling(total=1.0, total_of_squares=2.0, count=3.0)
    assert update_reward_scaling(scaling, scored(), CreditConfig(), kl_coefficient=0.1) is scaling


def test_rolling_sums_step_over_what_is_no_response():
    rewards = torch.tensor([[9.0, 1.0, 9.0, 2.0, 9.0]])
    mask = torch.tensor([[False, True, False, True, False]])
    assert rolling_returns(rewards, mask, gamma=0.5).tolist() == [[0.0, 1.0, 0.0, 2.5, 0.0]]


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), -1e30])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("placement", ["token", "last"])
def test_what_stands_outside_the_responses_does_not_matter(
    scored: Make, estimator: str, placement: str, fill: float
):
    config = CreditConfig(kl_estimator=estimator, kl_placement=placement)
    batches = scored(), scored(fill=fill)
    rewards = [shape_rewards(batch, config, kl_coefficient=0.1) for batch in batches]
    assert torch.equal(*rewards)
    clean, littered = (credit(batch, config, kl_coefficient=0.1) for batch in batches)
    for name in ("advantages", "returns", "values", "loss_mask"):
        assert torch.equal(getattr(clean, name), getattr(littered, name))


def test_filler_rows_and_more_padding_change_nothing(scored: Make):
    batch, config = scored(), CreditConfig()
    whole = credit(batch, config, kl_coefficient=0.1)
    longer = credit(scored(seq_length=16), config, kl_coefficient=0.1)
    rows = torch.tensor([2, 1, 0, 0, 3])
    filler = taken(batch, rows)
    filler.loss_mask[3] = False
    filler.rewards[3] = float("nan")
    filled = credit(filler, config, kl_coefficient=0.1)
    kept = torch.tensor([0, 1, 2, 4])
    for name in ("advantages", "returns", "values", "loss_mask"):
        assert torch.equal(getattr(longer, name)[:, :11], getattr(whole, name)), name
        assert not getattr(longer, name)[:, 11:].any()
        found, expected = getattr(filled, name), getattr(whole, name)[rows[kept]]
        torch.testing.assert_close(found[kept], expected, rtol=1e-12, atol=1e-14)
        assert not found[3].any()
    logged = statistics(batch, whole, config, kl_coefficient=0.1)
    of_all = statistics(filler, filled, config, kl_coefficient=0.1)
    for name, moments in logged.items():
        torch.testing.assert_close(of_all[name].sums, moments.sums, rtol=1e-12, atol=1e-12)


def test_advantages_without_whitening_are_gaes(scored: Make):
    batch = scored()
    config = CreditConfig(normalize_advantages=False)
    experience = credit(batch, config, kl_coefficient=0.1)
    rewards = shape_rewards(batch, config, kl_coefficient=0.1)
    advantages, returns = gae(batch.values, rewards, batch.loss_mask, gamma=1.0, lam=0.95)
    assert torch.equal(experience.advantages, advantages)
    assert torch.equal(experience.returns, returns)


def test_unfinished_responses_are_learned_from_if_asked(scored: Make):
    batch = scored()
    masked, kept = (credit(batch, CreditConfig(mask_unfinished=x), kl_coefficient=0.1) for x in (True, False))
    assert torch.equal(kept.loss_mask, batch.loss_mask)
    assert torch.equal(masked.loss_mask, batch.loss_mask & batch.finished[:, None])
    assert torch.equal(masked.advantages, kept.advantages)
    assert torch.equal(value_batch(batch, masked).loss_mask, batch.loss_mask)


def test_where_no_response_finished_nothing_is_learned(scored: Make):
    batch = replace(scored(), finished=torch.zeros(4, dtype=torch.bool))
    experience = credit(batch, CreditConfig(), kl_coefficient=0.1)
    logprobs = batch.logprobs.clone().requires_grad_()
    loss, _ = PolicyGradient()(ModelOutput(logprobs=logprobs), experience)
    loss.backward()
    assert (loss.item(), experience.count(Unit.TOKEN).item()) == (0, 0)
    assert not logprobs.grad.any()


def test_a_constant_reward_without_a_critic_teaches_nothing(scored: Make):
    batch = scored()
    flat = replace(batch, rewards=torch.ones(4, dtype=torch.float64), values=torch.zeros_like(batch.values))
    experience = credit(flat, CreditConfig(gae_lambda=1.0), kl_coefficient=0.0)
    assert experience.advantages.abs().max() < 1e-6


def test_what_is_logged(scored: Make):
    batch, config = scored(), CreditConfig()
    experience = credit(batch, config, kl_coefficient=0.1)
    logged = statistics(batch, experience, config, kl_coefficient=0.1)
    gaps = [response(batch, "logprobs", row) - response(batch, "reference_logprobs", row) for row in range(4)]
    rewards = batch.rewards.numpy()
    with_kl = [(r - 0.1 * np.abs(gap).sum()) / len(gap) for r, gap in zip(rewards, gaps, strict=True)]
    raw = [response(batch, "values", row) for row in range(4)]
    expected = {
        "rewards": rewards,
        "init_policy_kl": [np.abs(gap).mean() for gap in gaps],
        "rewards_with_kl": with_kl,
        "answer_kl": [gap.sum() for gap in gaps],
        "values": np.concatenate(raw),
    }
    for name, numbers in expected.items():
        assert logged[name].mean.item() == pytest.approx(np.mean(numbers), rel=1e-12), name
        assert logged[name].std.item() == pytest.approx(np.std(numbers), rel=1e-9), name
        assert logged[name].count == len(numbers)
    advantages = Moments.of(experience.returns - experience.values, batch.loss_mask)
    assert torch.equal(logged["advantages"].sums, advantages.sums)


def test_float32_stays_float32(scored: Make):
    experience = credit(scored(dtype=torch.float32), CreditConfig(), kl_coefficient=0.1)
    exact = credit(scored(), CreditConfig(), kl_coefficient=0.1)
    assert {experience.advantages.dtype, experience.returns.dtype} == {torch.float32}
    torch.testing.assert_close(experience.advantages.double(), exact.advantages, rtol=1e-5, atol=1e-5)


def test_the_controller_that_the_settings_ask_for():
    assert kl_controller(CreditConfig()) == KLController(coefficient=0.01, horizon=10000.0)
    steered = kl_controller(CreditConfig(adaptive_kl_target=6.0))
    assert steered == KLController(coefficient=0.01, target=6.0, horizon=10000.0)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (CreditConfig(initial_policy_kl_penalty=-1.0), "initial_policy_kl_penalty=-1.0 is out of range"),
        (CreditConfig(discount_factor=1.5), "discount_factor=1.5 is out of range"),
        (CreditConfig(gae_lambda=-0.1), "gae_lambda=-0.1 is out of range"),
        (CreditConfig(reward_clip=0.0), "reward_clip=0.0 is out of range"),
        (
            CreditConfig(scale_rewards=True, scaled_reward_clip=-1.0),
            "scaled_reward_clip=-1.0 is out of range",
        ),
        (CreditConfig(scaled_reward_clip=5.0), "scaled_reward_clip=5.0 needs trainer.ppo.scale_rewards=True"),
        (CreditConfig(adaptive_kl_target=0.0), "adaptive_kl_target=0.0 is out of range"),
        (CreditConfig(adaptive_kl_horizon=0.0), "adaptive_kl_horizon=0.0 is out of range"),
        (
            CreditConfig(initial_policy_kl_penalty=0.0, adaptive_kl_target=6.0),
            "adaptive_kl_target=6.0 steers",
        ),
    ],
)
def test_values_without_a_meaning_are_refused(config: CreditConfig, says: str):
    with pytest.raises(UserError, match=f"trainer.ppo.{says}"):
        config.check("trainer.ppo")


def test_values_with_a_meaning_are_not():
    CreditConfig(initial_policy_kl_penalty=0.0, reward_clip=5.0).check("trainer.ppo")
    CreditConfig(adaptive_kl_target=6.0, scale_rewards=True, scaled_reward_clip=10.0).check("trainer.ppo")
