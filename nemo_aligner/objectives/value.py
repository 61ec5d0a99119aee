# SPDX-License-Identifier: Apache-2.0
"""Proximal Policy Optimization's loss of the critic: squared error to the returns, clipped about the old values."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemo_aligner.batch import TokenBatch, Unit
from nemo_aligner.objectives.config import ValueConfig
from nemo_aligner.objectives.protocol import Metrics, ModelOutput, Wants
from nemo_aligner.rollout_batch import ValueBatch

MAX_RETURN = 1e15  # the squares of a batch's returns and values add up in float32


def _clipped(values: Tensor, old_values: Tensor, clip: float) -> Tensor:
    # Not V_old + clip(V - V_old), which within the range is V but for rounding.
    return values.clamp(old_values - clip, old_values + clip)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float) -> Tensor:
    """The loss of each token, ``max((V - R)^2, (V_clip - R)^2) / 2`` with V_clip = V held within
    ``V_old +- clip``.

    Value clipping of Engstrom 2020 (arXiv 2005.12729), who print the smaller of the two squares. The
    larger one, as in OpenAI's baselines, is what clips: a value out of its range on the return's side gets no
    gradient. With ``clip`` = 0, plain ``(V - R)^2 / 2``.

    values, old_values, returns: [B, S] float. Returns [B, S].

    >>> value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([2.0]), clip=0.5)
    tensor([1.1250])
    """
    error = (values - returns).square()
    if clip:
        error = torch.maximum(error, (_clipped(values, old_values, clip) - returns).square())
    return 0.5 * error


@dataclass(frozen=True)
class ValueLoss:
    """The mean of :func:`value_loss` over the responses' tokens."""

    config: ValueConfig = field(default_factory=ValueConfig)

    wants = frozenset({Wants.VALUES})
    unit = Unit.TOKEN
    metrics = ("loss", "values", "returns", "clip_fraction")

    def __call__(self, output: ModelOutput, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """The summed loss, and per response token "values", "returns" and "clip_fraction": how often the clip binds.

        It binds where the clipped value's error is the larger one, as TRL, verl and torchtune count it.
        """
        assert isinstance(batch, ValueBatch) and output.values is not None
        loss_tokens, count, clip = batch.loss_tokens(), batch.count(self.unit), self.config.loss_clip_val
        # Outside the mask any number may stand, NaN too: mask before arithmetic.
        values = torch.where(loss_tokens, output.values, 0)
        old = torch.where(loss_tokens, batch.values, 0)
        returns = torch.where(loss_tokens, batch.returns, 0)
        loss = value_loss(values, old, returns, clip=clip).sum()
        with torch.no_grad():
            near = _clipped(values, old, clip) if clip else values
            binds = (near - returns).abs() > (values - returns).abs()
            sums = {
                "loss": loss.detach(),
                "values": values.sum(),
                "returns": returns.sum(),
                "clip_fraction": binds.sum(),
            }
        return loss, {name: (total, count) for name, total in sums.items()}
