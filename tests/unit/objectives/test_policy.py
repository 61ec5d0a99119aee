# SPDX-License-Identifier: Apache-2.0
"""The policy's loss against values worked out by hand and a loop in float64."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from nemo_aligner.batch import Unit
from nemo_aligner.bounds import check_bounds
from nemo_aligner.errors import UserError
from nemo_aligner.objectives.config import PolicyConfig
from nemo_aligner.objectives.policy import PolicyGradient, clipped_surrogate
from nemo_aligner.objectives.protocol import ModelOutput, Wants
from nemo_aligner.rollout_batch import Experience

LENGTHS = (5, 3, 8)
CONFIGS = (
    PolicyConfig(),
    PolicyConfig(ratio_eps=0.1, ratio_eps_high=0.3),
    PolicyConfig(dual_clip=1.3, entropy_bonus=0.05),
    PolicyConfig(policy_loss="gspo", ratio_eps=0.01, ratio_eps_high=0.02),
    PolicyConfig(policy_loss="cispo", ratio_eps_high=0.1, entropy_bonus=0.05),
)


def batch(*, fill: float = 0.0) -> tuple[Experience, ModelOutput]:
    """Three rows and what a policy says of them now; ``fill`` stands where nothing is learned."""
    draw = torch.Generator().manual_seed(0)
    index = torch.arange(8)
    mask = torch.stack([(index >= 2) & (index < n) for n in LENGTHS])
    old, advantages, step, entropy = (
        torch.where(mask, torch.randn(3, 8, generator=draw, dtype=torch.float64), fill) for _ in range(4)
    )
    made = Experience(
        tokens=torch.zeros(3, 8, dtype=torch.int64),
        loss_mask=mask,
        lengths=torch.tensor(LENGTHS),
        logprobs=old - 2,
        reference_logprobs=old,
        advantages=advantages,
        returns=advantages,
        values=advantages,
    )
    return made, ModelOutput(logprobs=old - 2 + 0.3 * step, entropy=entropy.square())


def means(made: Experience, output: ModelOutput, config: PolicyConfig) -> dict[str, float]:
    loss, metrics = PolicyGradient(config)(output, made)
    assert metrics["loss"][0] == loss
    assert set(metrics) == set(PolicyGradient(config).metrics)
    return {name: total.item() / max(count.item(), 1) for name, (total, count) in metrics.items()}


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.0),  # within the range: the plain surrogate
        (1.5, 2.0, -2.4, 0.0),  # a good token, already likely enough
        (0.5, 2.0, -1.0, -2.0),  # a good token that became less likely comes back
        (0.5, -2.0, 1.6, 0.0),  # a bad token, already unlikely enough
        (1.5, -2.0, 3.0, 2.0),  # a bad token that became more likely comes back
        (9.0, -2.0, 18.0, 2.0),  # without any bound
        (3.0, 0.0, 0.0, 0.0),
    ],
)
def test_clipping_by_hand(ratio: float, advantage: float, loss: float, gradient: float):
    x = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    found = clipped_surrogate(x, torch.tensor([advantage], dtype=torch.float64), PolicyConfig())
    found.sum().backward()
    assert found.item() == pytest.approx(loss, rel=1e-12)
    assert x.grad.item() == pytest.approx(gradient, rel=1e-12)


@pytest.mark.parametrize(
    ("config", "ratio", "advantage", "loss", "gradient"),
    [
        (PolicyConfig(ratio_eps_high=0.5), 1.4, 1.0, -1.4, -1.0),
        (PolicyConfig(ratio_eps_high=0.5), 1.6, 1.0, -1.5, 0.0),
        (PolicyConfig(ratio_eps_high=0.5), 0.7, -1.0, 0.8, 0.0),
        (PolicyConfig(dual_clip=3.0), 9.0, -2.0, 6.0, 0.0),
        (PolicyConfig(dual_clip=3.0), 2.5, -2.0, 5.0, 2.0),
        (PolicyConfig(dual_clip=3.0), 9.0, 2.0, -2.4, 0.0),
    ],
)
def test_two_widths_and_a_bound_by_hand(
    config: PolicyConfig, ratio: float, advantage: float, loss: float, gradient: float
):
    x = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    found = clipped_surrogate(x, torch.tensor([advantage], dtype=torch.float64), config)
    found.sum().backward()
    assert found.item() == pytest.approx(loss, rel=1e-12)
    assert x.grad.item() == pytest.approx(gradient, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("config", "log_ratio", "advantage", "loss", "gradient"),
    [
        (PolicyConfig(), 95.0, 1.0, -1.2, 0.0),
        (PolicyConfig(dual_clip=3.0), 95.0, -1.0, 3.0, 0.0),
        (PolicyConfig(), 95.0, -1.0, math.exp(20), 0.0),  # at the bound, which is held
        (PolicyConfig(), -95.0, 1.0, -math.exp(-20), 0.0),
        (PolicyConfig(), -95.0, -1.0, 0.8, 0.0),
        (PolicyConfig(), 1e30, 1.0, -1.2, 0.0),
        (PolicyConfig(), 95.0, 0.0, 0.0, 0.0),
        (PolicyConfig(), 19.0, -1.0, math.exp(19), math.exp(19)),
    ],
)
def test_no_log_ratio_is_too_far(
    config: PolicyConfig, log_ratio: float, advantage: float, loss: float, gradient: float, dtype: torch.dtype
):
    made, _ = batch()
    mask = torch.zeros_like(made.loss_mask)
    mask[0, 2] = True
    old = torch.full(mask.shape, -1.0, dtype=dtype)
    one = replace(
        made, loss_mask=mask, logprobs=old, advantages=torch.full(mask.shape, advantage, dtype=dtype)
    )
    now = (old + log_ratio).requires_grad_()
    found, metrics = PolicyGradient(config)(ModelOutput(logprobs=now), one)
    found.backward()
    assert found.item() == pytest.approx(loss, rel=1e-6)
    assert now.grad[0, 2].item() == pytest.approx(gradient, rel=1e-6)
    assert all(torch.isfinite(total) for total, _ in metrics.values())
    assert 0 <= metrics["approx_kl"][0] <= 10


@pytest.mark.parametrize(
    ("ratio", "advantage", "binds"),
    [
        (1.5, 1.0, True),
        (0.5, -1.0, True),
        (1.5, -1.0, False),  # out of range, and the plain surrogate counts
        (0.5, 1.0, False),
        (1.1, 1.0, False),
        (1.5, 0.0, False),
    ],
)
def test_clip_fraction_counts_what_the_clip_binds_on(ratio: float, advantage: float, binds: bool):
    made, _ = batch()
    mask = torch.zeros_like(made.loss_mask)
    mask[0, 2] = True
    one = replace(made, loss_mask=mask, advantages=torch.full(mask.shape, advantage, dtype=torch.float64))
    _, metrics = PolicyGradient()(ModelOutput(logprobs=made.logprobs + math.log(ratio)), one)
    assert metrics["clip_fraction"][0] == binds


def by_loop(made: Experience, output: ModelOutput, config: PolicyConfig) -> dict[str, float]:
    """Python's floats, one token after another, from the published formulas."""
    low, high = 1 - config.ratio_eps, 1 + (config.ratio_eps_high or config.ratio_eps)
    if config.policy_loss == "cispo":
        low = 0.0
    sums, tokens = dict.fromkeys(PolicyGradient().metrics, 0.0), 0
    for i, n in enumerate(LENGTHS):
        apart = [float(output.logprobs[i, t] - made.logprobs[i, t]) for t in range(2, n)]
        for t in range(2, n):
            new, old = float(output.logprobs[i, t]), float(made.logprobs[i, t])
            is_gspo = config.policy_loss == "gspo"
            ratio = math.exp(sum(apart) / len(apart) if is_gspo else new - old)
            advantage = float(made.advantages[i, t])
            clamped = min(max(ratio, low), high)
            gain = min(ratio * advantage, clamped * advantage)
            if config.dual_clip and advantage < 0:
                gain = max(gain, config.dual_clip * advantage)
            if config.policy_loss == "cispo":
                gain = clamped * advantage * new
            bonus = config.entropy_bonus * float(output.entropy[i, t])
            token = {
                "loss": -gain - bonus,
                "ppo_ratio": ratio,
                "ppo_ratio_clamped": clamped,
                "clip_fraction": float(clamped * advantage < ratio * advantage),
                "approx_kl": math.exp(new - old) - 1 - (new - old),
                "scaled_entropy": bonus,
            }
            sums = {name: sums[name] + token[name] for name in sums}
            tokens += 1
    return {name: total / tokens for name, total in sums.items()}


@pytest.mark.parametrize("config", CONFIGS)
def test_a_loop_in_float64_says_the_same(config: PolicyConfig):
    expected = by_loop(*batch(), config)
    assert 0 < expected["clip_fraction"] < 1
    assert means(*batch(), config) == pytest.approx(expected, rel=1e-12, abs=1e-14)


# CISPO's weights have no gradient, though the loss follows them.
@pytest.mark.parametrize("config", [config for config in CONFIGS if config.policy_loss != "cispo"])
def test_gradcheck(config: PolicyConfig):
    made, output = batch()

    def loss(logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        return PolicyGradient(config)(ModelOutput(logprobs=logprobs, entropy=entropy), made)[0]

    inputs = (output.logprobs.requires_grad_(), output.entropy.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("policy_loss", ["ppo", "cispo"])
def test_before_any_update_it_is_the_policy_gradient(policy_loss: str):
    made, _ = batch()
    logprobs = made.logprobs.clone().requires_grad_()
    objective = PolicyGradient(PolicyConfig(policy_loss=policy_loss))
    loss, metrics = objective(ModelOutput(logprobs=logprobs), made)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, -made.advantages * made.loss_mask, rtol=1e-14, atol=0)
    assert (metrics["clip_fraction"][0], metrics["approx_kl"][0]) == (0, 0)


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), -1e30])
@pytest.mark.parametrize("config", CONFIGS)
def test_what_stands_where_nothing_is_learned_does_not_matter(config: PolicyConfig, fill: float):
    (made, output), (littered, dirty) = batch(), batch(fill=fill)
    assert means(littered, dirty, config) == means(made, output, config)
    logprobs = dirty.logprobs.requires_grad_()
    PolicyGradient(config)(dirty, littered)[0].backward()
    assert torch.isfinite(logprobs.grad).all()
    assert not logprobs.grad[~made.loss_mask].any()


@pytest.mark.parametrize("config", CONFIGS)
def test_filler_rows_packing_and_micro_batches_change_nothing(config: PolicyConfig):
    made, output = batch()
    expected = pytest.approx(means(made, output, config), rel=1e-12)
    fields = ("tokens", "loss_mask", "logprobs", "reference_logprobs", "advantages", "returns", "values")
    rows = torch.tensor([2, 0, 1, 1, 0])
    taken = {name: getattr(made, name)[rows] for name in fields}
    taken["loss_mask"][3:] = False
    filled = Experience(**taken, lengths=made.lengths[rows])
    given = ModelOutput(logprobs=output.logprobs[rows], entropy=output.entropy[rows])
    assert means(filled, given, config) == expected

    def packed(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[i, :n] for i, n in enumerate(LENGTHS)])[None]

    one_row = Experience(
        **{name: packed(getattr(made, name)) for name in fields},
        lengths=made.lengths,
        cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0).int(),
    )
    given = ModelOutput(logprobs=packed(output.logprobs), entropy=packed(output.entropy))
    assert means(one_row, given, config) == expected
    whole, _ = PolicyGradient(config)(output, made)
    parts = []
    for i, part in enumerate(made.split(1)):
        row = ModelOutput(logprobs=output.logprobs[i : i + 1], entropy=output.entropy[i : i + 1])
        parts.append(PolicyGradient(config)(row, part)[0].item())
    assert sum(parts) == pytest.approx(whole.item(), rel=1e-12)


@pytest.mark.parametrize("config", CONFIGS)
def test_nothing_learned_is_no_loss_and_no_gradient(config: PolicyConfig):
    made, output = batch(fill=float("nan"))
    empty = replace(made, loss_mask=torch.zeros_like(made.loss_mask))
    logprobs = output.logprobs.requires_grad_()
    loss, metrics = PolicyGradient(config)(output, empty)
    loss.backward()
    assert (loss.item(), int(metrics["loss"][1])) == (0, 0)
    assert not logprobs.grad.any()


def test_what_it_asks_for():
    objective = PolicyGradient()
    assert (objective.wants, objective.unit) == ({Wants.LOGPROBS}, Unit.TOKEN)
    with_entropy = PolicyGradient(PolicyConfig(entropy_bonus=0.01))
    assert with_entropy.wants == {Wants.LOGPROBS, Wants.ENTROPY}
    assert (objective.config.ratio_eps, objective.config.entropy_bonus) == (0.2, 0.0)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (PolicyConfig(ratio_eps=0.0), "ratio_eps=0.0"),
        (PolicyConfig(ratio_eps=1.0), "ratio_eps=1.0"),
        (PolicyConfig(ratio_eps_high=0.0), "ratio_eps_high=0.0"),
        (PolicyConfig(dual_clip=1.0), "dual_clip=1.0"),
        (PolicyConfig(entropy_bonus=-0.1), "entropy_bonus=-0.1"),
    ],
)
def test_values_without_a_meaning_are_refused(config: PolicyConfig, says: str):
    with pytest.raises(UserError, match=f"model.ppo.{says} is out of range"):
        check_bounds(config, "model.ppo")


def test_a_bound_of_the_surrogate_is_refused_where_there_is_none():
    with pytest.raises(UserError, match=r"model.ppo.dual_clip=3.0 .* model.ppo.policy_loss=cispo"):
        PolicyConfig(policy_loss="cispo", dual_clip=3.0)


@pytest.mark.parametrize("config", CONFIGS)
def test_values_with_a_meaning_are_not(config: PolicyConfig):
    check_bounds(config, "model.ppo")


def test_with_a_mean_of_sequences_each_response_weighs_the_same():
    config = PolicyConfig(loss_mean="sequence", entropy_bonus=0.0)
    mask = torch.tensor([[False, True, True, True, True], [False, False, True, False, False], [False] * 5])
    draw = torch.Generator().manual_seed(0)
    given = {name: torch.randn(3, 5, generator=draw, dtype=torch.float64) for name in ("new", "old", "gain")}
    zeros = torch.zeros(3, 5, dtype=torch.float64)
    rows = Experience(
        tokens=torch.zeros(3, 5, dtype=torch.int64),
        loss_mask=mask,
        lengths=torch.tensor([5, 3, 1]),
        logprobs=given["old"],
        reference_logprobs=given["old"] - 0.5,
        advantages=given["gain"],
        returns=zeros,
        values=zeros,
    )
    objective = PolicyGradient(config, kl_coefficient=0.1, kl_estimator="k2")
    loss, metrics = objective(ModelOutput(logprobs=given["new"]), rows)
    new, old, gain = (given[name].numpy() for name in ("new", "old", "gain"))
    ratio = np.exp(new - old)
    each = np.maximum(-gain * ratio, -gain * ratio.clip(0.8, 1.2)) + 0.1 * 0.5 * (new - old + 0.5) ** 2
    expected = [each[row][mask[row].numpy()].mean() for row in (0, 1)]
    assert loss.item() == pytest.approx(sum(expected), rel=1e-6)
    assert objective.unit is Unit.SEQUENCE
    assert metrics["loss"][1].item() == 2, "a row without loss tokens is no sequence"
    assert metrics["ppo_ratio"][1].item() == 5


@pytest.mark.parametrize(
    "name", ["ppo, token", "ppo, sequence", "ppo, constant", "gspo, sequence", "cispo, token"]
)
def test_losses_and_gradients_are_trls(name: str):
    frozen = json.loads((Path(__file__).parents[2] / "fixtures/trl_policy_losses.json").read_text())
    lengths = torch.tensor(frozen["lengths"])
    old, new = (torch.tensor(frozen[key], dtype=torch.float64) for key in ("old", "new"))
    mask = torch.arange(old.shape[1]) < lengths[:, None]
    advantages = torch.tensor(frozen["advantages"], dtype=torch.float64)[:, None].expand_as(old)
    prompted = {key: pad(x, (1, 0)) for key, x in {"old": old, "mask": mask, "gain": advantages}.items()}
    rows = Experience(
        tokens=torch.zeros(prompted["mask"].shape, dtype=torch.int64),
        loss_mask=prompted["mask"],
        lengths=lengths + 1,
        logprobs=prompted["old"],
        reference_logprobs=prompted["old"],
        advantages=prompted["gain"],
        returns=prompted["gain"],
        values=prompted["gain"],
    )
    policy_loss, loss_mean = name.split(", ")
    config = PolicyConfig(policy_loss=policy_loss, loss_mean=loss_mean, ratio_eps=0.2, ratio_eps_high=0.28)
    objective = PolicyGradient(config, max_length=8)
    now = new.clone().requires_grad_()
    loss, _ = objective(ModelOutput(logprobs=pad(now, (1, 0))), rows)
    loss = loss / rows.count(objective.unit)
    loss.backward()
    assert loss.item() == pytest.approx(frozen[name]["loss"], rel=1e-6)
    wanted = torch.tensor(frozen[name]["gradient"], dtype=torch.float64)
    torch.testing.assert_close(now.grad, wanted, rtol=1e-6, atol=1e-9)
