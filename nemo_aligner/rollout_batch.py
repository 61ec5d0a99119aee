# SPDX-License-Identifier: Apache-2.0
"""The data types of the online loop, in the order in which they are made; conventions and shapes as in ``batch.py``.

A sampler writes a Rollout to prompts. A ScoredRollout has the models' log-probs, rewards and values of it. The policy
learns from an Experience, or from ReferencedPairs; the critic from a ValueBatch. A response 7 2 to the prompt 5 6, with
a reward of 1:

>>> import torch
>>> from nemo_aligner.objectives.config import CreditConfig
>>> from nemo_aligner.objectives.credit import credit
>>> batch = TokenBatch.from_rows([([5, 6, 7, 2], [False, False, True, True])], pad_id=0, seq_length=5)
>>> logprobs = torch.tensor([[0.0, 0.0, -1.0, -2.0, 0.0]])
>>> given = {"prompt_lengths": torch.tensor([2]), "finished": torch.tensor([True]), "group": torch.tensor([0])}
>>> rollout = batch.extended(Rollout, **given, sampler_logprobs=logprobs)
>>> scores = {"rewards": torch.tensor([1.0]), "values": torch.tensor([[0.0, 0.0, 0.5, 0.25, 0.0]])}
>>> scored = rollout.extended(ScoredRollout, logprobs=logprobs, reference_logprobs=logprobs, **scores)
>>> experience = credit(scored, CreditConfig(gae_lambda=1.0, normalize_advantages=False), kl_coefficient=0.0)
>>> experience.advantages.tolist(), experience.returns.tolist()
([[0.0, 0.0, 0.5, 0.75, 0.0]], [[0.0, 0.0, 1.0, 1.0, 0.0]])
"""

import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nemo_aligner.batch import TokenBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A text that a sampler responds to."""

    tokens: Sequence[int]
    number: int  # decides the draws: the index among all prompts of the step, over all ranks; or by_content's
    sample: int = 0  # the number of this response among those to the prompt
    max_length: int | None = None  # tokens of the response; None: as many as the sampler allows

    @classmethod
    def by_content(cls, tokens: Sequence[int], *, sample: int = 0, max_length: int | None = None) -> "Prompt":
        """A prompt whose number, and so whose draws, follow from its tokens alone, wherever it stands."""
        number = zlib.crc32(array("q", tokens).tobytes())
        return cls(tokens=tokens, number=number, sample=sample, max_length=max_length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout(TokenBatch):
    """Responses as a sampler generated them; ``loss_mask`` marks their tokens, EOS included. Never packed.

    A sampler gives those to its prompts, a data parallel rank's; scores and updates are of the whole rollout, which
    every rank then has (``algorithms/rollout.py``).
    """

    prompt_lengths: Tensor  # [B] int64
    finished: Tensor  # [B] bool: ended by EOS or a stop string, not by the length limit
    # [B] int64: Prompt.number, which responses to one prompt share; prompts by_content are not compared by it
    group: Tensor
    # [B, S] float: by the sampler, of the distribution drawn from (after temperature, top-k, top-p)
    sampler_logprobs: Tensor

    def prompt(self, row: int) -> list[int]:
        """The tokens of a row's prompt."""
        return [int(token) for token in self.tokens[row, : self.prompt_lengths[row]]]

    def response(self, row: int) -> list[int]:
        """The tokens of a row's response, its end token included."""
        return [int(token) for token in self.tokens[row][self.loss_mask[row]]]

    def conversation(self, row: int) -> list[int]:
        """The tokens behind a row's prompt: the response, with the replies between its turns."""
        return [int(token) for token in self.tokens[row, self.prompt_lengths[row] : self.lengths[row]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRollout(Rollout):
    """Responses with their scores, before any update."""

    # [B, S] float: the policy's, by the trainer; of the distribution drawn from, as sampler_logprobs
    logprobs: Tensor
    # [B, S] float: likewise, of the model that the policy is held to: the teacher where the run has one, else the
    # initial policy; where neither is asked, as with a KL penalty of 0, the policy itself, so that every KL is 0.
    # A token that this model's top-k or top-p leaves out counts as kept: the number is finite
    reference_logprobs: Tensor
    # [B] float: the weighted sum of all rewards, before clipping, scaling and penalty; where the run has a teacher and
    # no rewards, credit.teacher_rewards
    rewards: Tensor
    # [B, S] float: the critic's of the state before each token; zeros where there is no critic
    values: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience(TokenBatch):
    """The inputs of an update of the policy; ``credit.value_batch`` makes the critic's of the same responses.

    ``loss_mask`` marks what the policy learns from: the responses' tokens, without those that the estimator or
    ``CreditConfig.mask_unfinished`` leaves out.
    """

    logprobs: Tensor  # [B, S] float: as in ScoredRollout, so the policy's before the update
    reference_logprobs: Tensor  # [B, S] float: as in ScoredRollout
    # [B, S] float: whitened where CreditConfig.whitens, times credit.sampler_weights; 0 outside the responses
    advantages: Tensor
    returns: Tensor  # [B, S] float: advantages before whitening, plus values; the critic's targets
    values: Tensor  # [B, S] float: as in ScoredRollout; 0 outside the responses


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueBatch(TokenBatch):
    """A train batch of a critic; ``loss_mask`` marks the tokens of responses."""

    values: Tensor  # [B, S] float: as in ScoredRollout; the loss is clipped around them
    returns: Tensor  # [B, S] float: the targets, as Experience.returns
