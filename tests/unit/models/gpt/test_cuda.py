# SPDX-License-Identifier: Apache-2.0
"""On a GPU: logits of transformers on a CPU, and a training step in fp32 and bf16."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import whole_logits
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_aligner.batch import TokenBatch
from nemo_aligner.checkpoint.convert import import_from_huggingface
from nemo_aligner.checkpoint.nemo_archive import open_nemo
from nemo_aligner.checkpoint.sharded import load_model
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.learning_rate import OptimConfig
from nemo_aligner.models.gpt.model import GPT, build_gpt
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.objectives.nll import NLL
from nemo_aligner.parallel import world
from nemo_aligner.parallel.ranks import Layout
from nemo_aligner.run.metrics import means

pytestmark = pytest.mark.gpu

LENGTHS = (17, 40, 3, 64)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    """transformers' model, and the .nemo of it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 101, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    folder = tmp_path_factory.mktemp("cuda")
    model.save_pretrained(folder / "hf")
    import_from_huggingface(folder / "hf", str(folder / "x.nemo"))
    return model, folder / "x.nemo"


def ours(path: Path, dtype: torch.dtype) -> GPT:
    with open_nemo(path) as archive:
        model = build_gpt(GPTConfig.from_dict(archive.config), Layout(), dtype)
        load_model(model, archive.weights)
    return model


def test_the_device_is_a_gpu():
    assert world.device().type == "cuda"


def test_logits_are_those_of_transformers(
    theirs: tuple[LlamaForCausalLM, Path], random_rows: Callable[..., TokenBatch]
):
    batch = random_rows(LENGTHS)
    found = whole_logits.logits(ours(theirs[1], torch.float32).eval(), batch)
    assert found is not None
    with torch.no_grad():
        wanted = theirs[0](batch.tokens).logits
    real = torch.arange(batch.seq_length)[None] < batch.lengths[:, None]
    torch.testing.assert_close(found.cpu()[real], wanted[real], atol=1e-3, rtol=0)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-2)])
def test_a_step_has_the_loss_and_the_grad_norm_of_transformers(
    theirs: tuple[LlamaForCausalLM, Path],
    random_rows: Callable[..., TokenBatch],
    dtype: torch.dtype,
    close: float,
):
    batch = random_rows(LENGTHS)
    policy = GPTPolicy(ours(theirs[1], dtype))
    policy.prepare_training(OptimConfig(), clip_grad=1.0, max_steps=10)
    metrics = means(policy.get_loss_and_metrics(batch.split(2), NLL(), forward_only=False))
    metrics |= policy.optimizer_step()
    reference = theirs[0]
    reference.zero_grad()
    labels = batch.tokens.masked_fill(torch.arange(batch.seq_length)[None] >= batch.lengths[:, None], -100)
    loss = reference(batch.tokens, labels=labels).loss
    loss.backward()
    squares = [p.grad.square().sum() for p in reference.parameters() if p.grad is not None]
    assert metrics["loss"] == pytest.approx(loss.item(), rel=close)
    assert metrics["grad_norm"] == pytest.approx(sum(squares).sqrt().item(), rel=close)
