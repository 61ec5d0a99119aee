# SPDX-License-Identifier: Apache-2.0
"""Norms and rotary angles against their formulas in float64."""

import math

import pytest
import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from nemo_aligner.models.gpt.config import GPTConfig, RopeScaling
from nemo_aligner.models.gpt.layers import GatedActivation, Norm, Rotation, RowRotary
from nemo_aligner.models.gpt.rope import inverse_frequencies, rotation_scale
from nemo_aligner.models.gpt.transformer import transformer_config
from nemo_aligner.parallel.ranks import Layout

SIZES = {"num_layers": 1, "hidden_size": 24, "ffn_hidden_size": 8, "num_attention_heads": 2, "vocab_size": 8}


@pytest.mark.parametrize("name", ["rmsnorm", "layernorm", "layernorm1p"])
def test_norms(name: str):
    config = GPTConfig(**SIZES, normalization=name, layernorm_epsilon=0.1)
    norm = Norm(transformer_config(config, Layout(), torch.float32), 24, eps=0.1)
    x = torch.randn(5, 3, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 1

    def formula(weight: torch.Tensor, bias: torch.Tensor | float) -> torch.Tensor:
        centred = x if name == "rmsnorm" else x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight + bias

    # As it is made, a norm scales by 1 and shifts by 0, however the weight is stored.
    torch.testing.assert_close(norm(x.float()).double(), formula(torch.ones(24), 0.0), rtol=1e-5, atol=1e-5)
    torch.nn.init.uniform_(norm.weight, -1, 1)
    bias = 0.0
    if name != "rmsnorm":
        torch.nn.init.uniform_(norm.bias, -1, 1)
        bias = norm.bias
    scale = norm.weight + 1 if name == "layernorm1p" else norm.weight
    torch.testing.assert_close(norm(x.float()).double(), formula(scale, bias).double(), rtol=1e-5, atol=1e-5)


def llama3(frequency: float, *, factor: float, low: float, high: float, context: int) -> float:
    """One frequency after Llama 3.1's stretching, by wavelength as its authors put it."""
    wavelength = 2 * math.pi / frequency
    if wavelength < context / high:
        return frequency
    if wavelength > context / low:
        return frequency / factor
    smooth = (context / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


@pytest.mark.parametrize("percentage", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("scaling", [None, "linear", "llama3"])
def test_angles_go_by_each_tokens_own_position(percentage: float, scaling: str | None):
    stretch = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = GPTConfig(
        **SIZES,
        kv_channels=24,
        rotary_percentage=percentage,
        rotary_base=1000.0,
        rope_scaling=None if scaling is None else RopeScaling(rope_type=scaling, factor=8.0, **stretch),
    )
    positions = torch.tensor([[0, 1, 2, 3], [700, 0, 1, 5]])
    found = RowRotary(config, torch.device("cpu"))(positions)
    size = int(24 * percentage)
    assert found.shape == (4, 2, 1, size)
    for i in range(size // 2):
        frequency = 1000.0 ** (-2 * i / size)
        if scaling == "linear":
            frequency /= 8
        elif scaling == "llama3":
            frequency = llama3(frequency, factor=8.0, low=1.0, high=4.0, context=64)
        expected = (positions.t() * frequency).float()
        for half in (i, i + size // 2):
            torch.testing.assert_close(found[:, :, 0, half], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"original_max_position_embeddings": 64},
        {"original_max_position_embeddings": 4096, "beta_fast": 16.0, "beta_slow": 2.0},
        {"original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.707},
        {"original_max_position_embeddings": 64, "truncate": False},
        {"original_max_position_embeddings": 4, "attention_factor": 1.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [8, 24, 128])
def test_yarn_is_transformers(settings: dict[str, float], head_dim: int):
    rope = {"rope_type": "yarn", "factor": 40.0} | settings
    theirs = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        rope_parameters=rope | {"rope_theta": 1e6},
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    config = GPTConfig.from_dict(SIZES | {"kv_channels": head_dim, "rotary_base": 1e6, "rope_scaling": rope})
    assert torch.equal(inverse_frequencies(config), frequencies)
    assert rotation_scale(config) == scale
    # Where Megatron turns queries and keys, it is told the same scale by settings of its own.
    megatron = transformer_config(config, Layout(), torch.float32)
    assert _yarn_get_concentration_factor_from_config(megatron) == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("percentage", [1.0, 0.5])
def test_a_turn_is_transformers(percentage: float):
    config = GPTConfig(**SIZES, kv_channels=24, rotary_percentage=percentage)
    size = int(24 * percentage)
    positions = torch.tensor([[0, 1, 2, 3], [7, 0, 1, 5]])
    angles = RowRotary(config, torch.device("cpu"))(positions)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, 3, 24, generator=draw, dtype=torch.float64).permute(1, 2, 0, 3).requires_grad_()
    rotation = Rotation.of(angles, torch.float64)
    # The cosines as transformers has them: [B, S, D].
    cos, sin = (angles[:, :, 0].double().permute(1, 0, 2) for angles in (angles.cos(), angles.sin()))
    expected, _ = apply_rotary_pos_emb(x[..., :size], x[..., :size], cos, sin)
    found = rotation.turn(x)
    assert found.is_contiguous()
    torch.testing.assert_close(found[..., :size], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found[..., size:], x[..., size:])
    assert torch.autograd.gradcheck(rotation.turn, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_in_low_precision_is_torchs(dtype: torch.dtype):
    norm = Norm(
        transformer_config(GPTConfig(**SIZES, normalization="rmsnorm"), Layout(), dtype), 24, eps=1e-5
    )
    draw = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(5, 3, 24, generator=draw).to(dtype) for _ in range(2))
    torch.nn.init.uniform_(norm.weight, -1, 1, generator=draw)
    found = [x.clone().requires_grad_(), norm.weight]
    wide = [tensor.detach().double().requires_grad_() for tensor in found]
    torch.autograd.backward(norm(found[0]), grad)
    torch.autograd.backward(torch.nn.functional.rms_norm(wide[0], (24,), wide[1], 1e-5), grad.double())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for narrow, exact in zip(found, wide, strict=True):
        torch.testing.assert_close(narrow.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


def test_rms_norm_gradients():
    config = GPTConfig(**SIZES, normalization="rmsnorm")
    norm = Norm(transformer_config(config, Layout(), torch.float64), 24, eps=0.1)
    x = torch.randn(
        4, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    weight = torch.linspace(-1, 1, 24, dtype=torch.float64, requires_grad=True)

    def through(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(through, (x, weight))


@pytest.mark.parametrize("name", ["swiglu", "geglu", "reglu"])
def test_gated_activations(name: str):
    config = transformer_config(
        GPTConfig(**SIZES, activation=name, bias_activation_fusion=False), Layout(), torch.float64
    )
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 16, dtype=torch.float64, generator=draw, requires_grad=True)
    towards = torch.randn(5, 3, 8, dtype=torch.float64, generator=draw)
    gate, up = x.chunk(2, dim=-1)
    formulas = {
        "swiglu": gate / (1 + torch.exp(-gate)),
        "geglu": gate * (1 + torch.erf(gate / math.sqrt(2))) / 2,
        "reglu": gate.clamp(min=0),
    }
    expected, before = formulas[name] * up, x.detach().clone()
    found = GatedActivation(config)(x * 1)  # whose memory the backward uses
    torch.testing.assert_close(found, expected)
    (exact,) = torch.autograd.grad(expected, x, towards)
    torch.testing.assert_close(torch.autograd.grad(found, x, towards)[0], exact)
    assert torch.equal(x, before)
    if name != "swiglu":  # whose input can be gone through once
        assert torch.autograd.gradcheck(GatedActivation(config), x)
