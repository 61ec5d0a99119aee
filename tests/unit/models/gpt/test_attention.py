# SPDX-License-Identifier: Apache-2.0
"""Who sees whom: packed rows and sliding windows."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import whole_logits

from nemo_aligner.batch import TokenBatch
from nemo_aligner.models.gpt import engine
from nemo_aligner.models.gpt.attention import attend
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.model import GPT
from nemo_aligner.objectives.nll import NLL
from nemo_aligner.run.metrics import means

VOCAB = 101
LENGTHS = (11, 1, 23, 2, 17)
SIZES = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
}
CONFIGS = {
    "rope": {"position_embedding_type": "rope", "num_query_groups": 2},
    "window": {"position_embedding_type": "rope", "num_query_groups": 1, "window_size": 4},
    "window of one": {"position_embedding_type": "rope", "window_size": 1},
    "learned positions": {"position_embedding_type": "learned_absolute", "max_position_embeddings": 64},
}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest, random_model: Callable[..., GPT]) -> GPT:
    return random_model(GPTConfig(**SIZES, **CONFIGS[request.param]))


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("total", [9, 14])
def test_attend_is_the_formula(window: int | None, total: int):
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, n, 8, generator=draw, dtype=torch.float64)
        for heads, n in ((6, 9), (3, total), (3, total))
    )
    found = attend(q, k, v, scale=0.3, window=window)
    for row, head, query in ((0, 0, 0), (0, 5, 8), (1, 2, 4), (1, 3, 8)):
        at = total - 9 + query
        seen = slice(0 if window is None else max(0, at - window + 1), at + 1)
        keys, values = k[row, head // 2, seen], v[row, head // 2, seen]
        expected = torch.softmax(0.3 * keys @ q[row, head, query], 0) @ values
        torch.testing.assert_close(found[row, head, query], expected)


@pytest.mark.parametrize("length", [65, 128, 200])
@pytest.mark.parametrize("groups", [1, 3])
def test_attend_in_blocks_is_torchs(length: int, groups: int):
    """Its gradients too; queries lie in memory as the layer has them."""
    draw = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(length, 2, heads, 8, generator=draw, dtype=torch.float64).permute(1, 2, 0, 3)
        for heads in (6, groups, groups)
    ]
    q, k, v = (x.requires_grad_() for x in inputs)
    found = attend(q, k, v, scale=0.3)
    wide = [x.repeat_interleave(6 // groups, dim=1) for x in (k, v)]
    expected = F.scaled_dot_product_attention(q, *wide, is_causal=True, scale=0.3)
    torch.testing.assert_close(found, expected)
    towards = torch.randn(expected.shape, generator=draw, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(found, (q, k, v), towards),
        torch.autograd.grad(expected, (q, k, v), towards),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_packed_rows_are_each_row_alone(
    model: GPT, random_rows: Callable[..., TokenBatch], packed: Callable[[TokenBatch], TokenBatch]
):
    batch = random_rows(LENGTHS)
    found = whole_logits.logits(model, packed(batch))[0]
    start = 0
    for row, length in enumerate(LENGTHS):
        alone = replace(
            batch,
            tokens=batch.tokens[row : row + 1, :length],
            loss_mask=batch.loss_mask[row : row + 1, :length],
            lengths=batch.lengths[row : row + 1],
        )
        expected = whole_logits.logits(model, alone)[0]
        torch.testing.assert_close(found[start : start + length], expected, rtol=1e-6, atol=1e-5)
        start += length


def test_packed_rows_never_see_their_neighbours(
    model: GPT, random_rows: Callable[..., TokenBatch], packed: Callable[[TokenBatch], TokenBatch]
):
    batch = random_rows(LENGTHS)
    poisoned = replace(batch, tokens=batch.tokens.clone())
    poisoned.tokens[2] = (poisoned.tokens[2] + 1) % VOCAB
    before, after = (whole_logits.logits(model, packed(x))[0] for x in (batch, poisoned))
    start, end = sum(LENGTHS[:2]), sum(LENGTHS[:3])
    assert torch.equal(before[:start], after[:start])
    assert torch.equal(before[end:], after[end:])
    assert not torch.isclose(before[start:end], after[start:end]).all(1).any()


def test_packed_and_padded_rows_have_one_loss_and_gradient(
    model: GPT, random_rows: Callable[..., TokenBatch], packed: Callable[[TokenBatch], TokenBatch]
):
    batch = random_rows(LENGTHS)
    losses, gradients = [], []
    for form in (batch, packed(batch)):
        losses.append(means(engine.forward_backward(model, [form], NLL(), forward_only=False))["loss"])
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad()
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
