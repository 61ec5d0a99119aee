# SPDX-License-Identifier: Apache-2.0
"""Masked reductions against numpy, and estimates of the KL divergence against the divergence itself."""

import math

import numpy as np
import pytest
import torch

from nemo_aligner.objectives.reduce import (
    Moments,
    kl_abs,
    kl_k1,
    kl_k2,
    kl_k3,
    likelihood_ratio,
    masked_mean,
    whiten,
)


def drawn(seed: int = 0, rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, 6] numbers, and a mask that leaves out a third of them and all of the first row."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, 6, generator=draw) < 0.67
    mask[0] = False
    return torch.randn(rows, 6, generator=draw, dtype=torch.float64) * 3 + 1, mask


def test_masked_means():
    x = torch.tensor([[1.0, 2.0, 6.0], [5.0, 7.0, float("nan")]])
    mask = torch.tensor([[True, False, True], [False, True, False]])
    assert masked_mean(x, mask).item() == pytest.approx(14 / 3)
    assert masked_mean(x, mask, dim=1).tolist() == [3.5, 7.0]
    assert masked_mean(x, torch.zeros_like(mask), dim=1).tolist() == [0.0, 0.0]


def test_moments_are_numpys():
    x, mask = drawn()
    chosen = x.numpy()[mask.numpy()]
    moments = Moments.of(x, mask)
    assert moments.count == chosen.size
    assert moments.mean.item() == pytest.approx(np.mean(chosen), rel=1e-13)
    assert moments.variance.item() == pytest.approx(np.var(chosen), rel=1e-12)
    assert moments.std.item() == pytest.approx(np.std(chosen), rel=1e-12)
    assert Moments.of(x).mean.item() == pytest.approx(x.mean().item(), rel=1e-13)


def test_a_small_spread_about_a_large_mean_survives():
    x = (1000 + 0.01 * torch.randn(4096, generator=torch.Generator().manual_seed(0))).float()
    assert Moments.of(x).std.item() == pytest.approx(np.std(x.double().numpy()), rel=1e-6)


def test_whitening_is_the_formula_and_leaves_mean_0_variance_1():
    x, mask = drawn()
    chosen = x.numpy()[mask.numpy()]
    expected = (chosen - chosen.mean()) / np.sqrt(chosen.var() + 1e-8)
    white = whiten(x, mask, Moments.of(x, mask))
    np.testing.assert_allclose(white.numpy()[mask.numpy()], expected, rtol=1e-12)
    assert not white[~mask].any()
    again = Moments.of(white, mask)
    assert again.mean.item() == pytest.approx(0, abs=1e-14)
    assert again.variance.item() == pytest.approx(1, abs=1e-8)
    assert whiten(x.float(), mask, Moments.of(x, mask)).dtype == torch.float32


def test_whitening_by_hand():
    x, mask = torch.tensor([[1.0, 5.0, 99.0]]), torch.tensor([[True, True, False]])
    assert whiten(x, mask, Moments.of(x, mask)).tolist() == [[-1.0, 1.0, 0.0]]


@pytest.mark.parametrize("kept", [0, 1])
def test_nothing_and_one_number_whiten_to_zero(kept: int):
    x = torch.tensor([[7.0, float("nan")]])
    mask = torch.tensor([[bool(kept), False]])
    moments = Moments.of(x, mask)
    assert (moments.count, moments.variance) == (kept, 0)
    assert whiten(x, mask, moments).tolist() == [[0.0, 0.0]]


def test_estimates_by_hand():
    p, q = torch.tensor(math.log(0.5)), torch.tensor(math.log(0.25))
    two = math.log(2)
    assert kl_k1(p, q).item() == pytest.approx(two)
    assert kl_k1(q, p).item() == pytest.approx(-two)
    assert kl_abs(q, p).item() == pytest.approx(two)
    assert kl_k2(q, p).item() == pytest.approx(two**2 / 2)
    assert kl_k3(p, q).item() == pytest.approx(0.5 - 1 + two)
    assert kl_k3(q, p).item() == pytest.approx(2 - 1 - two)


def test_their_expectations_over_a_distribution():
    draw = torch.Generator().manual_seed(1)
    # So close that no token's k3 comes to its bound.
    p, q = (0.4 * torch.randn(2, 100, generator=draw, dtype=torch.float64)).log_softmax(-1)
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    ).item()
    means = {f: (p.exp() * f(p, q)).sum().item() for f in (kl_k1, kl_abs, kl_k2, kl_k3)}
    assert means[kl_k1] == pytest.approx(divergence, rel=1e-12)
    assert means[kl_k3] == pytest.approx(divergence, rel=1e-12)
    assert means[kl_abs] > divergence
    assert means[kl_k2] > 0


def test_k3_of_close_policies_keeps_its_digits():
    gap = torch.tensor(1e-3)
    assert kl_k3(torch.tensor(0.0), gap).item() == pytest.approx(5.0017e-7, rel=1e-3)
    assert kl_k3(torch.tensor(-3.0), torch.tensor(-3.0)).item() == 0


@pytest.mark.parametrize("gap", [95.0, -95.0, 1e30, -1e30, float("inf")])
def test_ratios_and_k3_are_bounded(gap: float):
    reference = torch.tensor(-0.5)
    now = (reference + gap).requires_grad_()
    ratio, k3 = likelihood_ratio(now - reference), kl_k3(reference, now)
    assert math.exp(-20) * 0.999 <= ratio.item() <= math.exp(20) * 1.001
    assert 0 <= k3.item() <= 10
    (ratio + k3).backward()
    assert now.grad == 0
