# SPDX-License-Identifier: Apache-2.0
"""A GPT with a scalar head: a reward model, or a critic, behind the alignable interface."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_aligner.batch import TokenBatch, Unit
from nemo_aligner.models.gpt import engine
from nemo_aligner.models.gpt.heads import HeadConfig
from nemo_aligner.models.gpt.learner import GPTLearner
from nemo_aligner.models.gpt.model import GPT, InterleavedGPT
from nemo_aligner.objectives.protocol import Metrics, ModelOutput, Wants
from nemo_aligner.parallel import collectives, world

__all__ = ["GPTCritic", "RewardScale"]


class _Ask:
    """The objective of asking: it wants one thing of the head and has no loss."""

    top_k = 0
    unit = Unit.SEQUENCE
    metrics: tuple[str, ...] = ()

    def __init__(self, wants: Wants) -> None:
        self.wants = frozenset({wants})

    def weights(self, batch: TokenBatch) -> None:  # noqa: ARG002 - the protocol's
        return None

    def __call__(self, output: ModelOutput, batch: TokenBatch) -> tuple[Tensor, Metrics]:  # noqa: ARG002
        return torch.zeros((), device=world.device()), {}


@dataclass(frozen=True, kw_only=True)
class RewardScale:
    """From what the head gives to the reward that is served: (x @ weights - mean) / std."""

    weights: tuple[float, ...] | None = None  # of the attributes; None: they are not merged
    mean: float = 0.0
    std: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """[N, A] -> [N], or [N, A] where several attributes are not merged."""
        if self.weights is not None:
            x = (x * torch.tensor(self.weights, device=x.device, dtype=x.dtype)).sum(-1, keepdim=True)
        x = (x - self.mean) / self.std
        return x[:, 0] if x.shape[1] == 1 else x


class GPTCritic(GPTLearner):
    """Rewards of sequences and values of states."""

    def __init__(
        self,
        model: GPT | InterleavedGPT,
        *,
        head: HeadConfig,
        scale: RewardScale = RewardScale(),
        seed: int = 1234,
    ) -> None:
        super().__init__(model, seed=seed)
        self.head, self.scale = head, scale

    def infer(self, batch: TokenBatch) -> Tensor:
        """[N] float (or [N, A], see :class:`RewardScale`) on every rank of the model: rewards of the sequences."""
        outputs = self._ask(batch, Wants.REWARDS)
        shape = (batch.lengths.numel(), self.head.outputs)
        return self.scale(collectives.from_last_stage(outputs[0].rewards if outputs else None, shape))

    def values(self, batch: TokenBatch) -> Tensor:
        """[B, S] float on every rank of the model: of the state before each token of ``batch.mask``, else 0."""
        outputs = self._ask(batch, Wants.VALUES)
        shape = tuple(batch.tokens.shape)
        return collectives.from_last_stage(outputs[0].values if outputs else None, shape)

    def _ask(self, batch: TokenBatch, wants: Wants) -> list[ModelOutput]:
        outputs: list[ModelOutput] = []
        with self.inference():
            engine.run(self._model, [batch], _Ask(wants), forward_only=True, outputs=outputs)
        return outputs
