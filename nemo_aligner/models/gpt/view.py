# SPDX-License-Identifier: Apache-2.0
"""From hidden states to what an objective wants: positions picked, then projected, onto the vocabulary in chunks.

The one place where position t's token meets the hidden state of t - 1.
"""

from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from nemo_aligner.batch import TokenBatch
from nemo_aligner.models.gpt.heads import ScalarHead
from nemo_aligner.models.gpt.model import GPT
from nemo_aligner.models.gpt.sampling import Drawn
from nemo_aligner.objectives.protocol import ModelOutput, Objective, Wants
from nemo_aligner.parallel import world
from nemo_aligner.parallel.vocab import HeadRequest

# Of all positions: if no more are read, they are picked before the last layer's MLP, else after the last layer.
FEW = 0.9


@dataclass(frozen=True, kw_only=True)
class Projection:
    """How hidden states become logits."""

    kept_logits_bytes: int = 1 << 30  # above this the backward recomputes them
    # what the objective's sum is multiplied with before the backward, if known
    loss_factor: float | None = None
    # how the learned tokens were drawn; what is wanted is then of that distribution
    drawn: Drawn | None = None


def worth_picking(model: GPT, batch: TokenBatch, objective: Objective) -> Tensor | None:
    """[n] places in [S * B] of the hidden states that :func:`view` reads, in its order; None where it picks them."""
    if model.config.sequence_parallel:
        return None  # each rank has other positions
    if model.rm_head is None or objective.wants == {Wants.VALUES}:
        row, position = _before_learned(batch)
    elif objective.wants == {Wants.REWARDS} and not model.rm_head.head.average:
        row, position = batch.ends()  # the states there have seen the whole sequences
    else:
        return None
    return position * batch.num_rows + row if 0 < len(row) <= FEW * batch.tokens.numel() else None


def _before_learned(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """([n] row, [n] position) of the states that learned tokens are predicted from."""
    row, position = batch.learned().nonzero(as_tuple=True)
    return row, position - 1


def _pick(hidden: Tensor, row: Tensor, position: Tensor, *, picked: bool) -> Tensor:
    """[S, B, H], or [n, 1, H] where they are ``picked``, to [n, H]."""
    rows, flat = hidden.shape[1], hidden.flatten(0, 1)
    return flat if picked else flat.index_select(0, position * rows + row)


def view(
    model: GPT,
    hidden: Tensor,
    batch: TokenBatch,
    objective: Objective,
    projection: Projection,
    *,
    picked: bool = False,
) -> ModelOutput:
    """What ``objective`` wants of this micro-batch; tensors are [B, S], 0 where nothing is learned.

    Args:
        hidden: [S, B, H] of the last stage, or this rank's [S / TP, B, H] with sequence parallelism; where they are
            ``picked``, [n, 1, H], those of :func:`worth_picking`.
    """
    if model.rm_head is not None:
        return _scalar_view(model.rm_head, hidden, batch, objective, picked=picked)
    learned = batch.learned()
    row, position = learned.nonzero(as_tuple=True)
    if model.config.sequence_parallel:
        # Its backward reduce-scatters: each rank's gradient is the part of its slice of the vocabulary.
        hidden = tensor_parallel.gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=True
        )
    selected = _pick(hidden, row, position - 1, picked=picked)
    if not model.config.sequence_parallel and world.tp_size() > 1:
        selected = tensor_parallel.copy_to_tensor_model_parallel_region(selected)
    weights, drawn = objective.weights(batch), projection.drawn
    first = world.tp_rank() * (model.gpt_config.padded_vocab_size(world.tp_size()) // world.tp_size())
    out = model.head(
        selected,
        batch.tokens[learned],
        request=HeadRequest(
            vocab_size=model.gpt_config.vocab_size,
            entropy=Wants.ENTROPY in objective.wants,
            top_k=objective.top_k if Wants.TOPK in objective.wants else 0,
            kept_logits_bytes=projection.kept_logits_bytes,
            transform=drawn.transform(batch, row, position, first=first) if drawn else None,
        ),
        weights=None if weights is None else weights[learned] * (projection.loss_factor or 1.0),
        exact=projection.loss_factor is not None,
    )
    assert not isinstance(out, Tensor)
    return ModelOutput(
        logprobs=_spread(out.logprobs, learned),
        entropy=_spread(out.entropy, learned),
        topk_logprobs=_spread(out.topk_logprobs, learned),
        topk_ids=_spread(out.topk_ids, learned),
    )


def _scalar_view(
    head: ScalarHead, hidden: Tensor, batch: TokenBatch, objective: Objective, *, picked: bool
) -> ModelOutput:
    """Rewards of sequences, values of the states before learned tokens."""
    if head.sequence_parallel:
        # Each rank has the whole head: the gradient of its slice is all there is.
        hidden = tensor_parallel.gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=False
        )
    rewards = values = None
    if Wants.REWARDS in objective.wants:
        states = (
            _averages(hidden, batch) if head.head.average else _pick(hidden, *batch.ends(), picked=picked)
        )
        rewards = head(states)
    if Wants.VALUES in objective.wants:
        states = _pick(hidden, *_before_learned(batch), picked=picked)
        values = _spread(head(states)[:, 0], batch.learned())
    return ModelOutput(rewards=rewards, values=values)


def _averages(hidden: Tensor, batch: TokenBatch) -> Tensor:
    """[S, B, H] -> [N, H]: the mean over each sequence's tokens."""
    real = torch.arange(batch.seq_length, device=hidden.device)[None]
    real = real < (batch.lengths[:, None] if batch.cu_seqlens is None else batch.cu_seqlens[-1])
    # Sums of half precision stop growing at some hundred tokens.
    total = hidden.new_zeros(batch.lengths.numel(), hidden.shape[-1], dtype=torch.float32)
    flat = (hidden.transpose(0, 1) * real[..., None]).reshape(-1, hidden.shape[-1]).float()
    total = total.index_add(0, batch.sequence_ids().reshape(-1), flat)
    return (total / batch.lengths[:, None]).to(hidden.dtype)


def _spread(values: Tensor | None, learned: Tensor) -> Tensor | None:
    """[n, ...] at learned positions -> [B, S, ...], 0 elsewhere."""
    if values is None:
        return None
    full = values.new_zeros(*learned.shape, *values.shape[1:])
    return full.masked_scatter(learned.reshape(*learned.shape, *[1] * (values.ndim - 1)), values)
