# SPDX-License-Identifier: Apache-2.0
"""All that a trainer may call on a model. Anything that offers these methods can be aligned; nothing is inherited."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from nemo_aligner.batch import TokenBatch
from nemo_aligner.models.sampling_config import SamplingConfig
from nemo_aligner.objectives.protocol import Objective, Sums
from nemo_aligner.rollout_batch import Prompt, Rollout


class Turns(Protocol):
    """The other side of conversations, whose replies stand between the turns of a response.

    Called on the first rank of each of the model's copies.
    """

    @property
    def places(self) -> int | None:
        """Positions of a prompt, its turns and their replies, at most; None: as many as the model has."""
        ...

    def ended(self, prompt: Prompt, turn: Sequence[int]) -> None:
        """Take the tokens of a turn that has ended by itself, its end token among them; do not wait for the reply."""
        ...

    def cut(self, prompt: Prompt) -> None:
        """Note that a limit has cut the response, in a turn or after a reply: it goes on no further."""
        ...

    def replies(self, *, wait: bool) -> Mapping[tuple[int, int], Sequence[int] | None]:
        """Return what has come by (prompt's number, sample): tokens that the next turn goes on from; None: the end.

        Args:
            wait: nothing else is to be done: wait for a while until something comes.
        """
        ...


class SupervisedInterface(Protocol):
    """A model that learns from batches."""

    def get_loss_and_metrics(
        self, batches: Sequence[TokenBatch], objective: Objective, *, forward_only: bool
    ) -> Sums:
        """Run this data parallel rank's micro-batches of one step.

        Args:
            batches: micro-batches, as many on every data parallel rank.
            objective: its loss is divided by its unit's count over the whole global batch.
            forward_only: False leaves gradients behind for :meth:`optimizer_step`.

        Returns:
            {metric: (sum, count)} over the global batch, the same on every rank; "loss" among them.
        """
        ...

    def optimizer_step(self) -> dict[str, float]:
        """Clip, step, advance the schedule.

        Where the loss of the last :meth:`get_loss_and_metrics` or the gradient is not finite, weights and optimizer
        stay as they are; the schedule goes on.

        Returns:
            "lr", "grad_norm" before clipping, and "skipped_steps": 1 where the step was left out, else 0; the same on
            every rank.
        """
        ...

    def offload_optimizer(self) -> None:
        """Make room on the device for inference; the next training step takes it back."""
        ...


class Inferrable(Protocol):
    """A model that can be asked without learning."""

    def inference(self) -> AbstractContextManager[None]:
        """Within it, dropout is off and no gradients are kept."""
        ...


class AlignableGenerativeInterface(SupervisedInterface, Inferrable, Protocol):
    """A language model that learns, scores and writes."""

    def get_loss_and_metrics(
        self,
        batches: Sequence[TokenBatch],
        objective: Objective,
        *,
        forward_only: bool,
        sampling: SamplingConfig | None = None,
    ) -> Sums:
        """As every model's; with ``sampling`` the objective sees the distribution of :meth:`logprobs` with it."""
        ...

    def logprobs(
        self, batch: TokenBatch, sampling: SamplingConfig | None = None, *, loss_tokens_only: bool = False
    ) -> Tensor:
        """[B, S] float: log p(token t | tokens before t), 0 where it is not asked for.

        Args:
            loss_tokens_only: ask for the loss tokens only, also without ``sampling``.
            sampling: None asks for all tokens of the model's own distribution. Else the loss tokens, responses of
                :meth:`generate`, get the log-probs by which these settings draw: equal to ``sampler_logprobs`` while
                the weights are the same. A token that top_k, top_p, min_p or min_length leave out counts as kept
                beside those that they keep, so its log-prob is finite: a small one far from the border, and on the
                border, where two roundings may differ, the one it was drawn with.
        """
        ...

    def as_reference(self) -> AbstractContextManager[None]:
        """Within it, the model has the weights of the initial policy."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        *,
        step: int = 0,
        slots: int = 64,
        watch: Callable[[int, Sequence[int]], None] | None = None,
        turns: Turns | None = None,
    ) -> Rollout:
        """One response to each of this data parallel rank's prompts, the same on all ranks of its model.

        Args:
            prompts: their numbers and samples are global: the draws are a function of them, of ``sampling.seed``,
                ``step`` and the place in the response alone.
            slots: responses that are generated at once, at most.
            step: of training.
            watch: called after each step of all slots, with the responses that have ended and the tokens of the step.
            turns: replies to each turn that ends, and the response goes on behind them: ``loss_mask`` marks the model's
                own tokens alone, and ``sampling``'s ``max_length`` is of all of them, ``min_length`` of a turn's. A
                response is finished where ``turns`` ends it; the model's positions may cut it.

        Raises:
            UserError: a prompt is empty, or leaves no room for a response.
        """
        ...


class TeacherInterface(Protocol):
    """A language model that another one learns from."""

    def logprobs(
        self, batch: TokenBatch, sampling: SamplingConfig | None = None, *, loss_tokens_only: bool = False
    ) -> Tensor:
        """See :class:`AlignableGenerativeInterface`."""
        ...

    def topk(self, batch: TokenBatch, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` most likely tokens at the place of each loss token, given those before it.

        Returns:
            [B, S, K] float log-probs, descending, and [B, S, K] int64 tokens; 0 where nothing is learned. K is ``k``,
            or the size of a smaller vocabulary.
        """
        ...


class RewardModelInterface(Inferrable, Protocol):
    """A model that scores whole texts."""

    def infer(self, batch: TokenBatch, *, micro_batch_size: int | None = None) -> Tensor:
        """Rewards [B], or [B, A] of several attributes.

        Args:
            micro_batch_size: rows of a forward pass; None: all of them.
        """
        ...


class CriticModelInterface(SupervisedInterface, Inferrable, Protocol):
    """A critic, which may share its job with a reward model."""

    def values(self, batch: TokenBatch, *, micro_batch_size: int | None = None) -> Tensor:
        """[B, S]: of the state before each token of ``batch.loss_mask``, else 0.

        Args:
            micro_batch_size: rows of a forward pass; None: all of them.
        """
        ...

    def infer_rm_critic(
        self, batch: TokenBatch, *, micro_batch_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(rewards [B], :meth:`values`)."""
        ...
