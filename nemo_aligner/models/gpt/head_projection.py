# SPDX-License-Identifier: Apache-2.0
"""From hidden states to what an objective wants: positions are selected, then projected, onto the vocabulary in chunks.

The one place where position t's token meets the hidden state of t - 1.
"""

from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from nemo_aligner.batch import TokenBatch
from nemo_aligner.models.gpt.heads import ScalarHead
from nemo_aligner.models.gpt.model import GPT
from nemo_aligner.models.gpt.sampling import SampledDistribution
from nemo_aligner.objectives.protocol import (
    CandidateObjective,
    LinearObjective,
    ModelOutput,
    Objective,
    TopKObjective,
    Wants,
)
from nemo_aligner.parallel import world
from nemo_aligner.parallel.vocab import HeadRequest

# Of all positions: if no more are read, they are selected before the last layer's MLP, else after the last layer.
FEW = 0.9


@dataclass(frozen=True, kw_only=True)
class Projection:
    """The settings of the head's projection to logits."""

    kept_logits_bytes: int = 1 << 30  # above this the backward recomputes them
    # what the objective's sum is multiplied with before the backward, if known
    loss_scale: float | None = None
    # the distribution that the loss tokens were sampled from; outputs are then of it
    sampled: SampledDistribution | None = None
    known_ids: int | None = None  # ids from here on have no probability; None: all of the model's have one


def select_positions(model: GPT, batch: TokenBatch, objective: Objective) -> Tensor | None:
    """[n] places in [S * B] of the hidden states that :func:`head_projection` reads; None: it selects them."""
    if model.config.sequence_parallel:
        return None  # each rank has other positions
    if model.rm_head is None or objective.wants == {Wants.VALUES}:
        row, position = _before_loss_tokens(batch)
    elif objective.wants == {Wants.REWARDS} and not model.rm_head.head.average:
        row, position = batch.ends()  # the states there have seen the whole sequences
    else:
        return None
    return position * batch.num_rows + row if 0 < len(row) <= FEW * batch.tokens.numel() else None


def _before_loss_tokens(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """([n] row, [n] position) of the states that loss tokens are predicted from."""
    row, position = batch.loss_tokens().nonzero(as_tuple=True)
    return row, position - 1


def _select(hidden: Tensor, row: Tensor, position: Tensor, *, preselected: bool) -> Tensor:
    """[S, B, H], or [n, 1, H] where they are ``preselected``, to [n, H]."""
    rows, flat = hidden.shape[1], hidden.flatten(0, 1)
    return flat if preselected else flat.index_select(0, position * rows + row)


def head_projection(
    model: GPT,
    hidden: Tensor,
    batch: TokenBatch,
    objective: Objective,
    projection: Projection,
    *,
    preselected: bool = False,
) -> ModelOutput:
    """The outputs that ``objective`` wants of this micro-batch; tensors are [B, S], 0 outside the loss mask.

    Args:
        hidden: [S, B, H] of the last stage, or this rank's [S / TP, B, H] with sequence parallelism; where they are
            ``preselected``, [n, 1, H], those of :func:`select_positions`.
    """
    if model.rm_head is not None:
        return _scalar_outputs(model.rm_head, hidden, batch, objective, preselected=preselected)
    loss_tokens = batch.loss_tokens()
    row, position = loss_tokens.nonzero(as_tuple=True)
    if model.config.sequence_parallel:
        # Its backward reduce-scatters: each rank's gradient is the part of its slice of the vocabulary.
        hidden = tensor_parallel.gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=True
        )
    selected = _select(hidden, row, position - 1, preselected=preselected)
    if not model.config.sequence_parallel and world.tp_size() > 1:
        selected = tensor_parallel.copy_to_tensor_model_parallel_region(selected)
    logprob_grad, sampled = None, projection.sampled
    if isinstance(objective, LinearObjective):
        logprob_grad = objective.logprob_grad(batch)[loss_tokens] * (projection.loss_scale or 1.0)
    first = world.tp_rank() * (model.gpt_config.padded_vocab_size(world.tp_size()) // world.tp_size())
    out = model.head(
        selected,
        batch.tokens[loss_tokens],
        request=HeadRequest(
            vocab_size=projection.known_ids or model.gpt_config.vocab_size,
            entropy=Wants.ENTROPY in objective.wants,
            top_k=objective.top_k if isinstance(objective, TopKObjective) else 0,
            ids=objective.candidates(batch)[loss_tokens]
            if isinstance(objective, CandidateObjective)
            else None,
            kept_logits_bytes=projection.kept_logits_bytes,
            transform=sampled.transform(batch, row, position, first=first) if sampled else None,
        ),
        logprob_grad=logprob_grad,
        grad_is_exact=projection.loss_scale is not None,
    )
    assert not isinstance(out, Tensor)
    return ModelOutput(
        logprobs=_spread(out.logprobs, loss_tokens),
        entropy=_spread(out.entropy, loss_tokens),
        topk_logprobs=_spread(out.topk_logprobs, loss_tokens),
        topk_ids=_spread(out.topk_ids, loss_tokens),
    )


def _scalar_outputs(
    head: ScalarHead, hidden: Tensor, batch: TokenBatch, objective: Objective, *, preselected: bool
) -> ModelOutput:
    """Rewards of sequences, values of the states before loss tokens."""
    if head.sequence_parallel:
        # Each rank has the whole head: the gradient of its slice is all there is.
        hidden = tensor_parallel.gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=False
        )
    rewards = values = None
    if Wants.REWARDS in objective.wants:
        states = (
            _averages(hidden, batch)
            if head.head.average
            else _select(hidden, *batch.ends(), preselected=preselected)
        )
        rewards = head(states)
    if Wants.VALUES in objective.wants:
        states = _select(hidden, *_before_loss_tokens(batch), preselected=preselected)
        values = _spread(head(states)[:, 0], batch.loss_tokens())
    return ModelOutput(rewards=rewards, values=values)


def _averages(hidden: Tensor, batch: TokenBatch) -> Tensor:
    """[S, B, H] -> [N, H]: the mean over each sequence's tokens."""
    # Sums of half precision stop growing at some hundred tokens.
    total = hidden.new_zeros(batch.lengths.numel(), hidden.shape[-1], dtype=torch.float32)
    flat = (hidden.transpose(0, 1) * batch.real_tokens()[..., None]).reshape(-1, hidden.shape[-1]).float()
    total = total.index_add(0, batch.sequence_ids().reshape(-1), flat)
    return (total / batch.lengths[:, None]).to(hidden.dtype)


def _spread(values: Tensor | None, loss_tokens: Tensor) -> Tensor | None:
    """[n, ...] at loss tokens -> [B, S, ...], 0 elsewhere."""
    if values is None:
        return None
    full = values.new_zeros(*loss_tokens.shape, *values.shape[1:])
    return full.masked_scatter(loss_tokens.reshape(*loss_tokens.shape, *[1] * (values.ndim - 1)), values)
