# SPDX-License-Identifier: Apache-2.0
"""A GPT that trains, scores and writes, behind the alignable interface."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nemo_aligner.batch import TokenBatch
from nemo_aligner.models.alignable_interface import Turns
from nemo_aligner.models.gpt.generate import Draws, Watch, generate
from nemo_aligner.models.gpt.learner import GPTLearner
from nemo_aligner.models.gpt.model import GPT, InterleavedGPT
from nemo_aligner.models.gpt.sampling import SampledDistribution
from nemo_aligner.models.gpt.stops import Detokenizer, Stops
from nemo_aligner.models.gpt.weight_swap import SwappedWeights
from nemo_aligner.models.sampling_config import SamplingConfig
from nemo_aligner.objectives.protocol import Objective, Sums, Wants
from nemo_aligner.parallel import world
from nemo_aligner.rollout_batch import Prompt, Rollout


class GPTPolicy(GPTLearner):
    """A language model that learns, scores and writes.

    Args:
        model: the GPT that learns, scores and writes.
        end_ids: the tokens that end a response.
        detokenizer: a tokenizer, without which responses can have no end strings.
        known_ids: :meth:`topk` seeks below this id; None: in the whole vocabulary.
    """

    def __init__(
        self,
        model: GPT | InterleavedGPT,
        *,
        end_ids: Sequence[int] = (),
        detokenizer: Detokenizer | None = None,
        kept_logits_bytes: int = 1 << 30,
        seed: int = 1234,
        known_ids: int | None = None,
    ) -> None:
        super().__init__(model, kept_logits_bytes=kept_logits_bytes, seed=seed)
        self.end_ids, self._detokenizer = tuple(end_ids), detokenizer
        vocabulary = self.model.gpt_config.vocab_size
        self._known_ids = min(known_ids or vocabulary, vocabulary)
        self._reference: SwappedWeights | None = None

    def get_loss_and_metrics(
        self,
        batches: Sequence[TokenBatch],
        objective: Objective,
        *,
        forward_only: bool,
        sampling: SamplingConfig | None = None,
    ) -> Sums:
        """See :class:`~nemo_aligner.models.alignable_interface.AlignableGenerativeInterface`."""
        return self._run(batches, objective, forward_only=forward_only, sampled=self._sampled(sampling))

    def logprobs(
        self, batch: TokenBatch, sampling: SamplingConfig | None = None, *, loss_tokens_only: bool = False
    ) -> Tensor:
        """[B, S] float on the last pipeline stage's ranks, zeros elsewhere.

        See :class:`~nemo_aligner.models.alignable_interface.AlignableGenerativeInterface`.
        """
        if sampling is None and not loss_tokens_only:
            batch = replace(batch, loss_mask=batch.real_tokens())
        outputs = self._ask([batch], Wants.LOGPROBS, sampled=self._sampled(sampling))
        if not outputs:
            return torch.zeros(batch.tokens.shape, device=world.device())
        assert outputs[0].logprobs is not None
        return outputs[0].logprobs

    def topk(self, batch: TokenBatch, k: int) -> tuple[Tensor, Tensor]:
        """See :class:`~nemo_aligner.models.alignable_interface.TeacherInterface`; zeros before the last stage."""
        k = min(k, self._known_ids)
        outputs = self._ask([batch], Wants.TOPK, top_k=k, known_ids=self._known_ids)
        if not outputs:
            empty = torch.zeros(*batch.tokens.shape, k, device=world.device())
            return empty, empty.long()
        logprobs, ids = outputs[0].topk_logprobs, outputs[0].topk_ids
        assert logprobs is not None and ids is not None
        return logprobs, ids

    def keep_reference(self) -> None:
        """Remember the weights of this moment as those of the initial policy, in CPU memory."""
        self._reference = SwappedWeights(self.model)

    def as_reference(self) -> contextlib.AbstractContextManager[None]:
        """See :class:`~nemo_aligner.models.alignable_interface.AlignableGenerativeInterface`."""
        assert self._reference is not None, "keep_reference comes first"
        return self._reference.swapped(self.model)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        *,
        step: int = 0,
        slots: int = 64,
        watch: Watch | None = None,
        turns: Turns | None = None,
    ) -> Rollout:
        """See :class:`~nemo_aligner.models.alignable_interface.AlignableGenerativeInterface`."""
        draws = Draws(config=sampling, stops=self._stops(sampling), step=step)
        with self.inference():
            return generate(self._model, prompts, draws, slots=slots, watch=watch, turns=turns)

    def _stops(self, sampling: SamplingConfig) -> Stops:
        return Stops.of(self.end_ids, sampling.end_strings, self._detokenizer)

    def _sampled(self, sampling: SamplingConfig | None) -> SampledDistribution | None:
        return sampling and SampledDistribution(config=sampling, end_ids=self._stops(sampling).ids)
