# SPDX-License-Identifier: Apache-2.0
"""All that a trainer may call on a model. Anything that offers these methods can be aligned; nothing is inherited."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import Tensor

from nemo_aligner.batch import TokenBatch
from nemo_aligner.objectives.protocol import Objective

__all__ = ["AlignableGenerativeInterface", "CriticModelInterface", "Inferrable", "SupervisedInterface"]


@runtime_checkable
class SupervisedInterface(Protocol):
    """A model that learns from batches."""

    def get_loss_and_metrics(
        self, batches: Sequence[TokenBatch], objective: Objective, *, forward_only: bool
    ) -> dict[str, float]:
        """Run this data parallel rank's micro-batches of one step.

        Args:
            batches: micro-batches, as many on every data parallel rank.
            objective: its loss is divided by its unit's count over the whole global batch.
            forward_only: False leaves gradients behind for :meth:`optimizer_step`.

        Returns:
            Means over the global batch, the same on every rank; "loss" among them.
        """
        ...

    def optimizer_step(self) -> dict[str, float]:
        """Clip, step, advance the schedule. Returns "lr" and "grad_norm", the same on every rank."""
        ...


@runtime_checkable
class Inferrable(Protocol):
    """A model that can be asked without learning."""

    def inference(self) -> AbstractContextManager[None]:
        """Within it, dropout is off and no gradients are kept."""
        ...

    def infer(self, batch: TokenBatch) -> Tensor:
        """A language model: log-probs [B, S]. A reward model: rewards [B]. A critic: values [B, S]."""
        ...


@runtime_checkable
class AlignableGenerativeInterface(SupervisedInterface, Inferrable, Protocol):
    """A language model that learns, scores and writes."""

    def logprobs(self, batch: TokenBatch) -> Tensor:
        """[B, S] float: log p(token t | tokens before t), at learned positions, else 0."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]:
        """The most likely continuation of each prompt, by token, without the prompt."""
        ...


@runtime_checkable
class CriticModelInterface(SupervisedInterface, Inferrable, Protocol):
    """A critic that shares its job with a reward model."""

    def infer_rm_critic(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """(rewards [B], values [B, S])."""
        ...
