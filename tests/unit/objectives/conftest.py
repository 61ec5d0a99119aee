# SPDX-License-Identifier: Apache-2.0
"""Scored responses of uneven length, to which the tests of credit, losses and whitening apply."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nemo_aligner.rollout_batch import ScoredRollout

PROMPTS = (2, 1, 4, 3)
LENGTHS = (7, 2, 9, 6)  # the second response is one token long
SEQ_LENGTH = 11


def scored(
    *, dtype: torch.dtype = torch.float64, seq_length: int = SEQ_LENGTH, fill: float = 0.0
) -> ScoredRollout:
    """Four responses, the third of them cut by the length limit. ``fill`` stands wherever no response is."""
    draw = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 50, (len(LENGTHS), SEQ_LENGTH), generator=draw)
    index = torch.arange(seq_length)
    mask = torch.stack([(index >= p) & (index < n) for p, n in zip(PROMPTS, LENGTHS, strict=True)])

    def tokens_of(center: float, spread: float) -> Tensor:
        drawn = center + spread * torch.randn(len(LENGTHS), SEQ_LENGTH, generator=draw, dtype=torch.float64)
        full = torch.full((len(LENGTHS), seq_length), fill, dtype=torch.float64)
        full[:, :SEQ_LENGTH] = drawn
        return torch.where(mask, full, fill).to(dtype)

    return ScoredRollout(
        tokens=torch.nn.functional.pad(tokens, (0, seq_length - SEQ_LENGTH)),
        loss_mask=mask,
        lengths=torch.tensor(LENGTHS),
        prompt_lengths=torch.tensor(PROMPTS),
        finished=torch.tensor([True, True, False, True]),
        group=torch.arange(len(LENGTHS)),
        sampler_logprobs=tokens_of(-2, 0.5),
        logprobs=tokens_of(-2, 0.5),
        reference_logprobs=tokens_of(-2, 0.5),
        rewards=torch.tensor([1.5, -0.5, 12.0, 0.25], dtype=dtype),
        values=tokens_of(0.3, 0.4),
    )


@pytest.fixture(name="scored")
def scored_fixture() -> Callable[..., ScoredRollout]:
    """The function :func:`scored`."""
    return scored
