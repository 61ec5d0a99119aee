# SPDX-License-Identifier: Apache-2.0
"""What peers' own code gives for the same numbers, frozen in tests/fixtures/peer_formulas.json with its source."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_aligner.batch import Unit
from nemo_aligner.objectives.adaptive import KLController
from nemo_aligner.objectives.config import CreditConfig, PolicyConfig, ValueConfig
from nemo_aligner.objectives.credit import credit, gae, shape_rewards
from nemo_aligner.objectives.policy import PolicyGradient
from nemo_aligner.objectives.protocol import ModelOutput
from nemo_aligner.objectives.reduce import kl_k1, kl_k2, kl_k3, masked_mean
from nemo_aligner.objectives.reward import bradley_terry
from nemo_aligner.objectives.value import ValueLoss
from nemo_aligner.rollout_batch import Experience, ScoredRollout, ValueBatch

FROZEN: dict[str, Any] = json.loads((Path(__file__).parents[2] / "fixtures/peer_formulas.json").read_text())
PROMPTS, LENGTHS = (torch.tensor(FROZEN[name]) for name in ("prompt_lengths", "lengths"))
ALIGNER = "NeMo-Aligner af2b3bd9, beta .1 abs KL, gamma .99, lambda .95"
SHAPE = (2, 7)
CONFIG = CreditConfig(
    initial_policy_kl_penalty=0.1, discount_factor=0.99, gae_lambda=0.95, mask_unfinished=False
)


def given(name: str) -> Tensor:
    return torch.tensor(FROZEN[name], dtype=torch.float64)


def mask() -> Tensor:
    at = torch.arange(SHAPE[1])
    return (at >= PROMPTS[:, None]) & (at < LENGTHS[:, None])


def scored() -> ScoredRollout:
    return ScoredRollout(
        tokens=torch.zeros(SHAPE, dtype=torch.int64),
        loss_mask=mask(),
        lengths=LENGTHS,
        prompt_lengths=PROMPTS,
        finished=torch.tensor([True, True]),
        group=torch.arange(2),
        sampler_logprobs=given("logprobs"),
        logprobs=given("logprobs"),
        reference_logprobs=given("reference_logprobs"),
        rewards=given("rewards"),
        values=given("values"),
    )


def theirs(name: str) -> Tensor:
    """A table of NeMo-Aligner's, whose column t speaks of token t + 1, as ours."""
    table = torch.tensor(FROZEN[ALIGNER][name], dtype=torch.float64)
    return torch.nn.functional.pad(table, (1, 0))


def test_token_rewards_are_nemo_aligners():
    shaped = shape_rewards(scored(), CONFIG, kl_coefficient=0.1)
    torch.testing.assert_close(shaped, theirs("token_rewards"), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("ours", "name", "tolerance"),
    [
        ("plain", "advantages", 1e-9),
        ("returns", "returns", 1e-9),
        ("advantages", "whitened (float32 statistics, 1e-6)", 1e-6),
    ],
)
def test_credit_is_nemo_aligners(ours: str, name: str, tolerance: float):
    experience = credit(scored(), CONFIG, kl_coefficient=0.1)
    found = experience.returns - experience.values if ours == "plain" else getattr(experience, ours)
    torch.testing.assert_close(found, theirs(name), rtol=0, atol=tolerance)


def test_gae_goes_over_a_hole_in_the_mask_as_verl_does():
    batch = scored()
    rewards = shape_rewards(batch, CONFIG, kl_coefficient=0.1)
    holed = mask()
    holed[0, 3] = False
    _, returns = gae(batch.values, rewards, holed, gamma=0.99, lam=0.95)
    wanted = torch.tensor(
        FROZEN["verl 1dda039b, token 3 of row 0 out of the mask, returns"], dtype=torch.float64
    )
    torch.testing.assert_close(returns[:, 1:], wanted, rtol=0, atol=1e-9)


def experience() -> Experience:
    zeros = torch.zeros(SHAPE, dtype=torch.float64)
    return Experience(
        tokens=torch.zeros(SHAPE, dtype=torch.int64),
        loss_mask=mask(),
        lengths=LENGTHS,
        logprobs=given("old_logprobs"),
        reference_logprobs=zeros,
        advantages=given("advantages"),
        returns=zeros,
        values=zeros,
    )


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (
            PolicyConfig(ratio_eps=0.2, ratio_eps_high=0.28, dual_clip=3.0),
            ("verl policy loss, eps .2/.28, dual clip 3", "OpenRLHF 3c3be623 policy loss, the same"),
        ),
        (PolicyConfig(ratio_eps=0.2), ("verl policy loss, eps .2, no dual clip",)),
    ],
)
def test_the_policys_loss_is_theirs(config: PolicyConfig, names: tuple[str, ...]):
    batch = experience()
    loss, _ = PolicyGradient(config)(ModelOutput(logprobs=given("logprobs")), batch)
    mean = loss.item() / batch.count(Unit.TOKEN).item()
    assert [FROZEN[name] for name in names] == pytest.approx([mean] * len(names), abs=1e-7)


def test_a_loss_is_the_mean_over_tokens_and_not_over_the_means_of_responses():
    """verl and OpenRLHF take the mean of row means in places; each token of ours weighs the same."""
    batch, now = experience(), given("logprobs")
    whole, _ = PolicyGradient()(ModelOutput(logprobs=now), batch)
    rows = [PolicyGradient()(ModelOutput(logprobs=now[i : i + 1]), batch.take([i])) for i in range(2)]
    counts = [batch.take([i]).count(Unit.TOKEN).item() for i in range(2)]
    assert counts == [4, 3]
    sums = [loss.item() for loss, _ in rows]
    token_mean, row_mean = sum(sums) / sum(counts), sum(s / c for s, c in zip(sums, counts, strict=True)) / 2
    assert whole.item() / 7 == pytest.approx(token_mean, rel=1e-12)
    assert FROZEN["verl policy loss, eps .2, no dual clip"] == pytest.approx(token_mean, abs=1e-7)
    assert abs(token_mean - row_mean) > 1e-3


@pytest.mark.parametrize(
    ("clip", "name"), [(0.2, "verl value loss, clip .2"), (0.0, "OpenRLHF value loss, no clip")]
)
def test_the_critics_loss_is_theirs(clip: float, name: str):
    batch = ValueBatch(
        tokens=torch.zeros(SHAPE, dtype=torch.int64),
        loss_mask=mask(),
        lengths=LENGTHS,
        values=given("values"),
        returns=given("returns"),
    )
    loss, _ = ValueLoss(ValueConfig(loss_clip_val=clip))(ModelOutput(values=given("new_values")), batch)
    assert loss.item() / batch.count(Unit.TOKEN).item() == pytest.approx(FROZEN[name], abs=1e-7)


@pytest.mark.parametrize(("estimate", "name"), [(kl_k1, "k1"), (kl_k2, "k2"), (kl_k3, "k3")])
def test_estimates_of_the_kl_are_verls(estimate: Any, name: str):
    found = masked_mean(estimate(given("logprobs"), given("reference_logprobs")), mask())
    assert found.item() == pytest.approx(FROZEN[f"verl {name}, masked mean"], abs=1e-7)


def test_the_loss_of_pairs_is_openrlhfs():
    chosen, rejected = torch.tensor([1.5, -0.5]), torch.tensor([0.2, 0.7])
    found = bradley_terry(chosen, rejected, margin=torch.tensor([0.1, 0.3])).mean().item()
    frozen = FROZEN["OpenRLHF PairWiseLoss [1.5,-.5] over [.2,.7], margin [.1,.3]"]
    assert found == pytest.approx(frozen, abs=1e-6)


def test_the_adaptive_coefficient_is_verls():
    found = KLController(coefficient=0.05, target=6.0, horizon=10000.0).update(9.0, 512).coefficient
    assert found == pytest.approx(FROZEN["verl AdaptiveKL .05, target 6, horizon 10000, kl 9, n 512"])
