# SPDX-License-Identifier: Apache-2.0
"""Negative log-likelihood: the loss of supervised fine-tuning."""

import torch
from torch import Tensor

from nemo_aligner.batch import TokenBatch, Unit
from nemo_aligner.objectives.protocol import Metrics, ModelOutput, Wants


def nll(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Token-level negative log-likelihood, summed: ``-sum_t mask_t log p(y_t | y_<t)``.

    logprobs: [B, S] float, mask: [B, S] bool. Returns [].

    >>> nll(torch.tensor([[0.0, -1.0, -2.0]]), torch.tensor([[False, True, True]]))
    tensor(3.)
    """
    return -torch.where(mask, logprobs, 0).sum()


class NLL:
    """The mean of :func:`nll` over every loss token of the global batch."""

    wants = frozenset({Wants.LOGPROBS})
    unit = Unit.TOKEN
    metrics = ("loss",)

    def logprob_grad(self, batch: TokenBatch) -> Tensor:
        """[B, S]: -1 at loss tokens."""
        return -batch.loss_tokens().float()

    def __call__(self, output: ModelOutput, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """The summed loss, and "loss" per loss token."""
        assert output.logprobs is not None
        loss = nll(output.logprobs, batch.loss_tokens())
        return loss, {"loss": (loss.detach(), batch.count(self.unit))}
