# SPDX-License-Identifier: Apache-2.0
"""Writing token by token with a key/value cache that has a length per row. One pipeline stage."""

from collections.abc import Sequence

import torch

from nemo_aligner.batch import TokenBatch
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.attention import KVCache
from nemo_aligner.models.gpt.model import GPT
from nemo_aligner.parallel import collectives, world

__all__ = ["greedy"]


@torch.no_grad()
def greedy(
    model: GPT, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, eos_id: int | None
) -> list[list[int]]:
    """The most likely next token of each prompt, again and again, until EOS or ``max_new_tokens``.

    Returns:
        New tokens of each prompt; EOS, where it was reached, is the last of them.

    Raises:
        UserError: there are more tokens than learned positions.
    """
    longest, places = max(len(p) for p in prompts) + max_new_tokens, model.gpt_config.max_position_embeddings
    if model.gpt_config.position_embedding_type == "learned_absolute" and longest > places:
        raise UserError(
            f"a prompt and max_new_tokens={max_new_tokens} make {longest} tokens, and the model has {places} "
            "learned positions",
            cure=f"lower max_new_tokens by {longest - places}",
        )
    assert world.pp_size() == 1 and not model.config.sequence_parallel, "greedy runs on one pipeline stage"
    device = world.device()
    batch = TokenBatch.from_rows(
        [(p, [False] * len(p)) for p in prompts], pad_id=0, seq_length=max(len(p) for p in prompts)
    ).to(device)
    cache = KVCache(torch.zeros_like(batch.lengths), max_length=batch.seq_length + max_new_tokens)
    hidden = model(**model.inputs(batch, cache))
    last = hidden[batch.lengths - 1, torch.arange(batch.num_rows, device=device)]
    cache.lengths = batch.lengths
    written: list[list[int]] = [[] for _ in prompts]
    alive = [True] * len(prompts)
    for _ in range(max_new_tokens):
        logits = model.head(last)
        assert isinstance(logits, torch.Tensor)
        gathered = collectives.gather_over_tensor_parallel(logits)[:, : model.gpt_config.vocab_size]
        token = gathered.argmax(-1)
        for row, new in enumerate(token.tolist()):
            if alive[row]:
                written[row].append(new)
                alive[row] = new != eos_id
        if not any(alive):
            break
        step = TokenBatch(
            tokens=token[:, None],
            mask=torch.zeros_like(token[:, None], dtype=torch.bool),
            lengths=torch.ones_like(token),
        )
        last = model(**model.inputs(step, cache))[0]
        cache.lengths = cache.lengths + 1
    return written
