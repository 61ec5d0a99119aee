# SPDX-License-Identifier: Apache-2.0
"""What an objective gets: per-token tensors that speak of position t by token t, at loss tokens only."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import whole_logits
from torch import Tensor

from nemo_aligner.batch import TokenBatch, Unit
from nemo_aligner.models.gpt import engine
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.heads import HeadConfig
from nemo_aligner.models.gpt.model import build_gpt
from nemo_aligner.models.gpt.recompute import Recompute
from nemo_aligner.objectives.protocol import Metrics, ModelOutput, Wants
from nemo_aligner.parallel import world
from nemo_aligner.parallel.ranks import Layout

CONFIG = GPTConfig(
    num_layers=2, hidden_size=16, ffn_hidden_size=32, num_attention_heads=2, vocab_size=50, precision="32"
)


class Everything:
    """Wants all there is, and records nothing of its own."""

    wants = frozenset(Wants)
    top_k = 3
    unit = Unit.SEQUENCE
    metrics = ("rows",)

    def __call__(self, output: ModelOutput, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        count = batch.count(self.unit)
        return output.logprobs.sum(), {"rows": (count, count)}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_every_wanted_field_is_that_of_the_plain_softmax(packed: bool):
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 50, (2, 9), generator=draw)
    mask = torch.rand(2, 9, generator=draw) < 0.6
    batch = TokenBatch(tokens=tokens, loss_mask=mask, lengths=torch.tensor([9, 9]))
    with world.ensure_single_process():
        model = build_gpt(CONFIG, Layout(), torch.float32).eval()
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.4)
        plain = whole_logits.logits(model, batch)
        given = batch
        if packed:
            cu_seqlens = torch.tensor([0, 9, 18], dtype=torch.int32)
            flat = {"tokens": tokens.reshape(1, -1), "loss_mask": mask.reshape(1, -1)}
            given = TokenBatch(**flat, lengths=batch.lengths, cu_seqlens=cu_seqlens)
        outputs: list[ModelOutput] = []
        engine.forward_backward(model, [given], Everything(), forward_only=True, outputs=outputs)
    # Position t's token is predicted by the logits at t - 1.
    logp = torch.log_softmax(plain[:, :-1].double(), dim=-1)
    best, ids = logp.topk(3)
    learned = mask[:, 1:]
    expected = {
        "logprobs": logp.gather(2, tokens[:, 1:, None])[:, :, 0] * learned,
        "entropy": -(logp.exp() * logp).sum(-1) * learned,
        "topk_logprobs": best * learned[..., None],
    }
    for name, value in expected.items():
        found = getattr(outputs[0], name).reshape(2, 9, *value.shape[2:])
        assert not found[:, 0].any()
        torch.testing.assert_close(found[:, 1:].double(), value, rtol=1e-5, atol=1e-5)
    assert torch.equal(outputs[0].topk_ids.reshape(2, 9, 3)[:, 1:], ids * learned[..., None])


class Squares:
    """The squares of what the head of a reward model or of a critic gives."""

    unit = Unit.SEQUENCE
    metrics = ()

    def __init__(self, wants: Wants) -> None:
        self.wants = frozenset({wants})

    def __call__(self, output: ModelOutput, batch: TokenBatch) -> tuple[Tensor, Metrics]:  # noqa: ARG002
        (found,) = (x for x in (output.rewards, output.values) if x is not None)
        return found.square().sum(), {}


@pytest.mark.parametrize("full", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("wants", "read"), [(Wants.REWARDS, 3), (Wants.VALUES, 9)])
def test_the_last_mlp_sees_only_what_is_read_and_nothing_else_changes(
    random_rows: Callable[..., TokenBatch],
    packed: Callable[[TokenBatch], TokenBatch],
    wants: Wants,
    read: int,
    packs: bool,
    full: bool,
):
    batch = random_rows((12, 9, 5))
    mask = batch.loss_mask.clone()
    mask[:, :2] = mask[:, 6:] = False  # 4, 4 and 3 loss tokens
    mask[0, 3] = mask[1, 4] = False
    batch = TokenBatch(tokens=batch.tokens, loss_mask=mask, lengths=batch.lengths)
    batch = packed(batch) if packs else batch
    config = replace(CONFIG, vocab_size=101, bias=False, normalization="rmsnorm", activation="swiglu")
    recompute = Recompute(granularity="full", method="uniform", num_layers=1) if full else Recompute()
    model = build_gpt(config, Layout(), torch.float32, recompute=recompute, head=HeadConfig()).train()
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)

    # The whole way: every position through every layer, then the head where it is wanted.
    responses = model.rm_head(model(**model.inputs(batch)))[:, :, 0].transpose(0, 1)
    if wants is Wants.REWARDS:
        chosen = responses[batch.ends()]
    else:
        row, position = batch.loss_tokens().nonzero(as_tuple=True)
        chosen = responses[row, position - 1]
    (chosen.square().sum() / 3).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    seen: set[tuple[int, int]] = set()
    for number, layer in enumerate(model.decoder.layers):
        layer.mlp.register_forward_pre_hook(
            lambda _, args, number=number: seen.add((number, args[0].shape[:2].numel()))
        )
    engine.forward_backward(model, [batch], Squares(wants), forward_only=False)
    assert seen == {(0, batch.tokens.numel()), (1, read)}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)
