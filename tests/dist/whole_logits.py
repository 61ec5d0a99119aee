# SPDX-License-Identifier: Apache-2.0
"""Logits of every position, for comparing small models."""

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from nemo_aligner.batch import TokenBatch
from nemo_aligner.models.gpt import engine
from nemo_aligner.models.gpt.model import GPT, InterleavedGPT
from nemo_aligner.parallel import collectives, world

__all__ = ["logits"]


@torch.no_grad()
def logits(model: GPT | InterleavedGPT, batch: TokenBatch) -> Tensor | None:
    """[B, S, V] float on the last stage's ranks, None elsewhere.

    Position t holds the distribution of token t + 1, as transformers has it.
    """
    found: list[Tensor] = []
    last = model.chunks[-1]

    def loss_func(hidden: Tensor):
        if last.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden)
        local = last.head(hidden.reshape(-1, hidden.shape[-1]))
        whole = collectives.gather_over_tensor_parallel(local)[:, : last.gpt_config.vocab_size]
        found.append(whole.reshape(*hidden.shape[:2], -1).transpose(0, 1).float())
        return hidden.new_zeros(()), {}

    def forward_step(iterator, module):
        return module(**last.inputs(next(iterator))), loss_func

    batches = engine.levelled(model, [batch.to(world.device())])
    engine.schedule(model.chunks, batches, forward_step, forward_only=True)
    return found[0] if found else None
