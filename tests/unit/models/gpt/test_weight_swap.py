# SPDX-License-Identifier: Apache-2.0
"""Two sets of weights in one model, and a head that gives one number for many."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from nemo_aligner.models.gpt.critic import RewardScale
from nemo_aligner.models.gpt.heads import HeadConfig, ScalarHead, fold_head
from nemo_aligner.models.gpt.weight_swap import SwappedWeights


def test_weights_are_exchanged_and_come_back_to_the_bit():
    model = nn.Linear(3, 2)
    early = {name: value.detach().clone() for name, value in model.named_parameters()}
    spare = SwappedWeights(model)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(1.0)
    late = {name: value.detach().clone() for name, value in model.named_parameters()}
    places = [value.data_ptr() for value in model.parameters()]
    with spare.swapped(model):
        assert all(torch.equal(value, early[name]) for name, value in model.named_parameters())
    assert all(torch.equal(value, late[name]) for name, value in model.named_parameters())
    # Where the optimizer's buffers know them.
    assert [value.data_ptr() for value in model.parameters()] == places


def test_weights_come_back_after_an_error():
    model, seen = nn.Linear(2, 2), []
    spare = SwappedWeights(model)
    with torch.no_grad():
        model.weight.zero_()
    try:
        with spare.swapped(model):
            seen.append(model.weight.sum().item())
            raise ValueError
    except ValueError:
        assert seen[0] != 0
    assert model.weight.sum() == 0


def test_a_folded_head_gives_what_the_scale_makes_of_the_numbers():
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    head = ScalarHead(HeadConfig(outputs=3), config)
    head.draw(seed=0, std=1.0)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([0.5, -1.0, 2.0]))
    hidden = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    scale = RewardScale(weights=(0.2, 0.3, -0.5), mean=1.5, std=4.0)
    wanted = scale(head(hidden))
    fold_head(head, weights=(0.2, 0.3, -0.5), mean=1.5, std=4.0)
    assert head.head.outputs == 1
    torch.testing.assert_close(head(hidden)[:, 0], wanted)
