# SPDX-License-Identifier: Apache-2.0
"""Weights in four bits: the values of bitsandbytes, what they cost, and what a model computes with them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import whole_logits
from torch import Tensor

from nemo_aligner.batch import TokenBatch
from nemo_aligner.checkpoint.sharded import load_model, save_model
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.learning_rate import OptimConfig
from nemo_aligner.models.gpt.lora import add_adapters
from nemo_aligner.models.gpt.model import GPT, build_gpt
from nemo_aligner.models.gpt.nf4 import NF4, quantize, quantized
from nemo_aligner.models.gpt.peft_config import LoRAConfig
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.models.gpt.projections import Projections
from nemo_aligner.objectives.nll import NLL
from nemo_aligner.parallel.ranks import Layout
from nemo_aligner.run.metrics import means

PLAIN = Projections(names=("o",), rows=(64,), head_dim=0, cuts_input=True)
CONFIG = GPTConfig(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=101,
    max_position_embeddings=64,
    precision="32",
    activation="swiglu",
    normalization="rmsnorm",
)


def digest(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()


def test_values_are_those_of_bitsandbytes():
    frozen = json.loads((Path(__file__).parents[3] / "fixtures/bitsandbytes_nf4.json").read_text())
    i, j = np.arange(64)[:, None], np.arange(448)[None]
    numbers = ((37 * i + 101 * j + i * j % 61) % 257 - 128) * (1 + i % 5) / 4096
    weight = torch.tensor(numbers.astype(np.float32))
    codes, sizes, table = quantized(weight)
    assert digest(codes) == frozen["codes"]
    assert digest(sizes) == frozen["sizes"]
    assert table[0, 1].item() == pytest.approx(frozen["offset"], rel=1e-6)
    packed = NF4(weight, PLAIN, place="a layer")
    assert packed.weight()[0, :8].tolist() == pytest.approx(frozen["first values"], abs=1e-8)
    assert digest(packed.weight()) == frozen["values"]
    assert sum(x.nbytes for x in packed.buffers()) / weight.numel() < 0.53


def test_zeros_stay_zeros():
    assert not NF4(torch.zeros(64, 128), PLAIN, place="a layer").weight().any()


@pytest.fixture
def batch(random_rows: Callable[..., TokenBatch]) -> TokenBatch:
    return random_rows([9, 14, 6])


def test_a_model_computes_with_the_stored_values(
    batch: TokenBatch, random_model: Callable[..., GPT], tmp_path: Path
):
    model = random_model(CONFIG)
    exact = whole_logits.logits(model, batch)
    quantize(model)
    found = whole_logits.logits(model, batch)
    assert 1e-3 < (found - exact).abs().mean() < exact.std()
    save_model(model, tmp_path / "weights")
    plain = build_gpt(CONFIG, Layout(), torch.float32).eval()
    load_model(plain, tmp_path / "weights")
    torch.testing.assert_close(found, whole_logits.logits(plain, batch), rtol=0, atol=1e-4)


def test_gradients_are_those_of_a_plain_base(
    batch: TokenBatch, random_model: Callable[..., GPT], tmp_path: Path
):
    model = random_model(CONFIG)
    quantize(model)
    save_model(model, tmp_path / "weights")
    plain = build_gpt(CONFIG, Layout(), torch.float32)
    load_model(plain, tmp_path / "weights")
    found = []
    for one in (model, plain):
        add_adapters(one, LoRAConfig(target_modules=("all",), adapter_dim=4), seed=3)
        policy = GPTPolicy(one)
        policy.prepare_training(OptimConfig(lr=1e-2), clip_grad=0.0, max_steps=3)
        for _ in range(2):
            loss = means(policy.get_loss_and_metrics([batch], NLL(), forward_only=False))["loss"]
            found.append((loss, policy.optimizer_step()["grad_norm"]))
    assert found[:2] == [pytest.approx(pair, rel=1e-4) for pair in found[2:]]
