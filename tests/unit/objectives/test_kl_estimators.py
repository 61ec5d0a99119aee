# SPDX-License-Identifier: Apache-2.0
"""KL penalties, in the loss and in the reward, against the divergence itself: every token of a small vocabulary.

Sixteen responses of one token stand for p, so that a mean over them is an expectation without any noise.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from nemo_aligner.errors import UserError
from nemo_aligner.objectives.config import CreditConfig
from nemo_aligner.objectives.credit import credit
from nemo_aligner.objectives.policy import PolicyGradient
from nemo_aligner.objectives.protocol import ModelOutput
from nemo_aligner.objectives.reduce import KLEstimator, estimate_kl
from nemo_aligner.rollout_batch import Experience, ScoredRollout

COUNTS = torch.tensor([8, 4, 3, 1])
P = COUNTS.double().numpy() / 16
Q = np.array([2, 5, 1, 8]) / 16
DRAWN = torch.arange(4).repeat_interleave(COUNTS)


def gradient(values: np.ndarray) -> np.ndarray:
    """By the logits z of p = softmax(z): that of sum_y p(y) values(y), with values held fixed."""
    return P * (values - P @ values)


KL = float(P @ np.log(P / Q))
REVERSE = gradient(np.log(P / Q))  # of KL(p || q)
FORWARD = P - Q  # of KL(q || p)


def rollout(logprobs: Tensor) -> ScoredRollout:
    """The sixteen responses, each behind a prompt of one token, without rewards."""
    n = DRAWN.numel()
    zeros = torch.zeros(n, dtype=torch.float64)
    return ScoredRollout(
        tokens=torch.stack((torch.zeros_like(DRAWN), DRAWN), dim=1),
        loss_mask=torch.tensor([[False, True]]).expand(n, 2),
        lengths=torch.full((n,), 2),
        prompt_lengths=torch.ones(n, dtype=torch.int64),
        finished=torch.ones(n, dtype=torch.bool),
        group=torch.arange(n),
        sampler_logprobs=torch.stack((zeros, logprobs), dim=1),
        logprobs=torch.stack((zeros, logprobs), dim=1),
        reference_logprobs=torch.stack((zeros, torch.from_numpy(np.log(Q))[DRAWN]), dim=1),
        rewards=zeros,
        values=torch.zeros(n, 2, dtype=torch.float64),
    )


def gradient_of_loss(objective: PolicyGradient, config: CreditConfig, *, coefficient: float) -> np.ndarray:
    logits = torch.from_numpy(np.log(P)).requires_grad_()
    logprobs = torch.log_softmax(logits, 0)[DRAWN]
    learned: Experience = credit(rollout(logprobs.detach()), config, kl_coefficient=coefficient)
    loss, metrics = objective(ModelOutput(logprobs=torch.stack((torch.zeros(16), logprobs), dim=1)), learned)
    (loss / metrics["loss"][1]).backward()
    assert logits.grad is not None
    return logits.grad.numpy()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("k1", KL),
        ("k2", float(P @ np.log(P / Q) ** 2) / 2),
        ("k3", KL),
        ("abs", float(P @ np.abs(np.log(P / Q)))),
    ],
)
def test_the_mean_of_an_estimate(name: KLEstimator, expected: float):
    p, q = (torch.from_numpy(np.log(x))[DRAWN] for x in (P, Q))
    assert estimate_kl(p, q, name).mean().item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("k2", REVERSE), ("k3", FORWARD), ("abs", gradient(np.sign(P - Q))), ("k1", np.zeros(4))],
)
def test_the_gradient_of_a_penalty_in_the_loss(name: KLEstimator, expected: np.ndarray):
    """Of k2 it is that of KL(p || q), of k3 that of KL(q || p); k1 has none."""
    config = CreditConfig(
        advantage_estimator="reinforce", kl_placement="loss", kl_estimator="k3", normalize_advantages=False
    )
    found = gradient_of_loss(PolicyGradient(kl_coefficient=0.5, kl_estimator=name), config, coefficient=0.5)
    np.testing.assert_allclose(found, 0.5 * expected, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("k1", REVERSE), ("k2", gradient(np.log(P / Q) ** 2 / 2)), ("k3", gradient(Q / P - 1 - np.log(Q / P)))],
)
@pytest.mark.parametrize("placement", ["token", "last"])
def test_the_gradient_of_a_penalty_in_the_reward(name: str, expected: np.ndarray, placement: str):
    """Of k1 it is that of KL(p || q)."""
    config = CreditConfig(
        advantage_estimator="reinforce",
        kl_placement=placement,
        kl_estimator=name,
        use_absolute_kl=False,
        normalize_advantages=False,
    )
    found = gradient_of_loss(PolicyGradient(), config, coefficient=0.5)
    np.testing.assert_allclose(found, 0.5 * expected, atol=1e-12)


def test_an_estimate_without_a_gradient_is_no_loss():
    config = CreditConfig(kl_placement="loss", kl_estimator="k1", use_absolute_kl=False)
    with pytest.raises(UserError, match=r"kl_estimator=k1 has no gradient in the mean"):
        config.check("trainer.ppo")
