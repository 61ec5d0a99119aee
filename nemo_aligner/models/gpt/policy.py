# SPDX-License-Identifier: Apache-2.0
"""A GPT that trains, scores and writes, behind the alignable interface."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nemo_aligner.batch import TokenBatch, Unit
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt import engine
from nemo_aligner.models.gpt.generate import greedy
from nemo_aligner.models.gpt.learner import GPTLearner
from nemo_aligner.models.gpt.model import GPT, InterleavedGPT
from nemo_aligner.objectives.protocol import Metrics, ModelOutput, Wants
from nemo_aligner.parallel import world

__all__ = ["GPTPolicy"]


class _Score:
    """The objective of scoring: it wants log-probs and has no loss."""

    wants = frozenset({Wants.LOGPROBS})
    top_k = 0
    unit = Unit.TOKEN
    metrics: tuple[str, ...] = ()

    def weights(self, batch: TokenBatch) -> None:  # noqa: ARG002 - the protocol's
        return None

    def __call__(self, output: ModelOutput, batch: TokenBatch) -> tuple[Tensor, Metrics]:  # noqa: ARG002
        assert output.logprobs is not None
        return output.logprobs.sum(), {}


class GPTPolicy(GPTLearner):
    """A language model that learns, scores and writes."""

    def __init__(
        self,
        model: GPT | InterleavedGPT,
        *,
        eos_id: int | None = None,
        kept_logits_bytes: int = 1 << 30,
        seed: int = 1234,
    ) -> None:
        super().__init__(model, kept_logits_bytes=kept_logits_bytes, seed=seed)
        self.eos_id = eos_id

    def logprobs(self, batch: TokenBatch) -> Tensor:
        """[B, S] float on the last pipeline stage's ranks, zeros elsewhere: log-probs of all tokens but the first."""
        ends = batch.lengths[:, None] if batch.cu_seqlens is None else batch.cu_seqlens[-1]
        batch = replace(batch, mask=torch.arange(batch.seq_length, device=ends.device)[None] < ends)
        outputs: list[ModelOutput] = []
        with self.inference():
            engine.run(self._model, [batch], _Score(), forward_only=True, outputs=outputs)
        if not outputs:
            return torch.zeros(batch.tokens.shape, device=world.device())
        assert outputs[0].logprobs is not None
        return outputs[0].logprobs

    infer = logprobs

    def generate(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]:
        """See :class:`~nemo_aligner.models.alignable_interface.AlignableGenerativeInterface`.

        Raises:
            UserError: the model is spread over pipeline stages, or the sequence over ranks.
        """
        model = self._model
        if isinstance(model, InterleavedGPT) or world.pp_size() > 1 or model.config.sequence_parallel:
            raise UserError(
                f"text cannot be generated at model.pipeline_model_parallel_size={world.pp_size()} and "
                f"model.sequence_parallel={model.config.sequence_parallel}",
                cure="set model.pipeline_model_parallel_size=1 and model.sequence_parallel=False",
            )
        with self.inference():
            return greedy(model, prompts, max_new_tokens=max_new_tokens, eos_id=self.eos_id)
