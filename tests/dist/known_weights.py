# SPDX-License-Identifier: Apache-2.0
"""Weights that follow from their places."""

import torch

from nemo_aligner.models.gpt.lora import adapters_of
from nemo_aligner.models.gpt.model import GPT
from nemo_aligner.parallel import world


def randomize(model: GPT) -> None:
    """Weights not at their initial scale, norms and biases not trivial. One rank only."""
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
        if parameter.ndim == 1:
            parameter.data.add_(0.7)


@torch.no_grad()
def fill_adapters(model: GPT) -> None:
    """Each B with numbers that follow from their place in the whole model's."""
    for adapters in adapters_of(model):
        for _, b in adapters.pairs():
            first = 0 if adapters.cuts_input else world.tp_rank() * b.shape[0]
            rows = torch.arange(first, first + b.shape[0])[:, None]
            b.copy_((rows + 3 * torch.arange(b.shape[1])).sin() * 0.1)
