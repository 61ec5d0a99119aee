# SPDX-License-Identifier: Apache-2.0
"""Losses of reward models: pairwise preferences and attribute labels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_aligner.batch import AttributeBatch, LabeledPairs, PreferenceBatch, TokenBatch, Unit
from nemo_aligner.objectives.config import PairLoss
from nemo_aligner.objectives.pairs import PAIR_METRICS, pair_loss
from nemo_aligner.objectives.protocol import Metrics, ModelOutput, Wants

HELPFULNESS = 4  # the attribute that pairs are compared by, where there are that many


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected - margin) of each pair.

    Ouyang 2022, arXiv 2203.02155, eq. 1; with the margin Touvron 2023, arXiv 2307.09288, eq. 2.

    chosen, rejected: [P] float. Returns [P].

    >>> bradley_terry(torch.tensor([1.0]), torch.tensor([1.0]))
    tensor([0.6931])
    """
    return -F.logsigmoid(chosen - rejected - margin)


def regression(predicted: Tensor, labels: Tensor) -> Tensor:
    """The squared error of each attribute, 0 where it has no label.

    predicted: [N, A] float; labels: [N, A] float, NaN where there is no label. Returns [N, A].

    >>> regression(torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, torch.nan]]))
    tensor([[4., 0.]])
    """
    return (predicted - labels.where(~labels.isnan(), predicted)).square()


class BradleyTerry:
    """The mean of :func:`bradley_terry` over every pair of the global batch."""

    wants = frozenset({Wants.REWARDS})
    unit = Unit.PAIR
    metrics = PAIR_METRICS

    def __call__(self, output: ModelOutput, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """The summed loss; accuracy, means and mean square of the rewards."""
        assert isinstance(batch, PreferenceBatch)
        assert output.rewards is not None
        chosen, rejected = output.rewards[:, 0].view(-1, 2).unbind(1)
        return pair_loss(chosen, rejected, bradley_terry(chosen, rejected), real=batch.real_pairs())


class AttributePairs:
    """Pairs that say how much better the better response is, compared by one attribute of the head.

    Sequences 2i and 2i + 1 carry the same first label: negative where the first is the better one, its size the margin.
    """

    wants = frozenset({Wants.REWARDS})
    unit = Unit.PAIR
    metrics = PAIR_METRICS

    def __init__(self, loss: PairLoss) -> None:
        self.loss = loss

    def __call__(self, output: ModelOutput, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """As :class:`BradleyTerry`, with the pair's strength as a margin or as a factor.

        The factor is "scaled_bt", of HelpSteer2-Preference (Wang 2024, arXiv 2410.01257); the margin is that
        of Llama 2 (Touvron 2023, arXiv 2307.09288, eq. 2).
        """
        assert isinstance(batch, LabeledPairs)
        assert output.rewards is not None
        scores = output.rewards[:, min(HELPFULNESS, output.rewards.shape[1] - 1)].view(-1, 2)
        label = batch.attributes[::2, 0].nan_to_num()
        first = label < 0
        chosen = scores[:, 0].where(first, scores[:, 1])
        rejected = scores[:, 1].where(first, scores[:, 0])
        match self.loss:
            case "margin_bt":
                loss = bradley_terry(chosen, rejected, margin=label.abs())
            case "scaled_bt":
                loss = label.abs() * bradley_terry(chosen, rejected)
            case _:
                loss = bradley_terry(chosen, rejected)
        return pair_loss(chosen, rejected, loss, real=batch.real_pairs())


class Regression:
    """The mean of :func:`regression` over every labeled attribute of the global batch.

    All attributes of a response by one head, as in HelpSteer2 (Wang 2024, arXiv 2406.08673).
    """

    wants = frozenset({Wants.REWARDS})
    unit = Unit.LABEL
    metrics = ("loss", "rewards_all_mean", "rewards_all_square")

    def __call__(self, output: ModelOutput, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """The summed loss; mean and mean square of what the head gives."""
        assert isinstance(batch, AttributeBatch)
        assert output.rewards is not None
        real = batch.labeled()
        loss = torch.where(real, regression(output.rewards, batch.attributes), 0).sum()
        given = torch.where(real, output.rewards.detach(), 0)
        count = real.sum()
        return loss, {
            "loss": (loss.detach(), count),
            "rewards_all_mean": (given.sum(), count),
            "rewards_all_square": (given.square().sum(), count),
        }
