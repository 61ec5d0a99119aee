# SPDX-License-Identifier: Apache-2.0
"""Recomputation changes neither losses nor gradients, dropout or not; what Megatron would assert on is refused."""

from collections.abc import Callable

import pytest
import torch

from nemo_aligner.batch import TokenBatch
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.learning_rate import OptimConfig
from nemo_aligner.models.gpt.model import GPT, build_gpt
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.models.gpt.recompute import Recompute
from nemo_aligner.objectives.nll import NLL
from nemo_aligner.parallel.ranks import Layout
from nemo_aligner.run.metrics import means

CONFIG = GPTConfig(
    num_layers=4,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=2,
    vocab_size=101,
    position_embedding_type="rope",
    hidden_dropout=0.2,
    attention_dropout=0.1,
)
FORMS = {
    "selective": Recompute(granularity="selective"),
    "uniform": Recompute(granularity="full", method="uniform", num_layers=2),
    "block": Recompute(granularity="full", method="block", num_layers=3),
}


def gradients(
    model: GPT, recompute: Recompute, batches: list[TokenBatch]
) -> tuple[float, list[torch.Tensor]]:
    twin = build_gpt(CONFIG, Layout(), torch.float32, recompute=recompute)
    twin.load_state_dict(model.state_dict())
    policy = GPTPolicy(twin)
    policy.prepare_training(OptimConfig(), clip_grad=1.0, max_steps=1)
    loss = means(policy.get_loss_and_metrics(batches, NLL(), forward_only=False))["loss"]
    return loss, [p.main_grad.clone() for p in policy.model.parameters()]


@pytest.mark.parametrize("form", FORMS)
def test_recompute_draws_the_same_dropout(
    form: str, random_model: Callable[..., GPT], random_rows: Callable[..., TokenBatch]
):
    model, batches = random_model(CONFIG), random_rows((9, 4, 12, 7)).split(2)
    kept, recomputed = (gradients(model, r, batches) for r in (Recompute(), FORMS[form]))
    assert recomputed[0] == kept[0]
    for found, expected in zip(recomputed[1], kept[1], strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("form", FORMS)
def test_recompute_computes_again(form: str, random_rows: Callable[..., TokenBatch]):
    """Layers, or core attentions, are called a second time in the backward."""
    model = build_gpt(CONFIG, Layout(), torch.float32, recompute=FORMS[form])
    layers = [x.self_attention.core_attention for x in model.decoder.layers]
    calls = []
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: calls.append(number))
    policy = GPTPolicy(model)
    policy.prepare_training(OptimConfig(), clip_grad=1.0, max_steps=1)
    policy.get_loss_and_metrics([random_rows((9, 4))], NLL(), forward_only=False)
    again = {"selective": [3, 2, 1, 0], "uniform": [2, 3, 0, 1], "block": [2, 1, 0]}[form]
    assert calls == [0, 1, 2, 3, *again]


@pytest.mark.parametrize(
    ("recompute", "problem"),
    [
        (Recompute(granularity="full", num_layers=1), "granularity=full needs .*_method"),
        (Recompute(granularity="full", method="block"), "_num_layers, which is null"),
        (Recompute(granularity="full", method="uniform", num_layers=0), "_num_layers, which is 0"),
        (Recompute(granularity="selective", num_layers=1), "is for whole layers, but .*=selective"),
        (Recompute(num_layers=1), "is for whole layers, but .*=null"),
    ],
)
def test_what_megatron_would_assert_on_is_refused(recompute: Recompute, problem: str):
    with pytest.raises(UserError, match=problem):
        recompute.check()


def test_groups_that_do_not_divide_the_layers_are_refused():
    recompute = Recompute(granularity="full", method="uniform", num_layers=3)
    with pytest.raises(UserError, match=r"does not divide the 4 layers[\s\S]*one of \[1, 2, 4\]"):
        build_gpt(CONFIG, Layout(), torch.float32, recompute=recompute)
