# SPDX-License-Identifier: Apache-2.0
"""Rewards by the policy itself, which is asked to score its responses in words."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_aligner.algorithms.ppo_config import JudgeConfig
from nemo_aligner.algorithms.skips import NotFinite
from nemo_aligner.data.row import Row
from nemo_aligner.environments import evaluation
from nemo_aligner.errors import UserError
from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface
from nemo_aligner.models.sampling_config import SamplingConfig
from nemo_aligner.parallel import collectives, world
from nemo_aligner.rollout_batch import Prompt, Rollout

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Scores responses by texts that ``policy`` writes about them: self-rewarding (Yuan 2024, arXiv 2401.10020)."""

    policy: AlignableGenerativeInterface
    config: JudgeConfig
    block: str  # the section of its settings, to name in errors
    template: str  # with {prompt} and {response}
    encode: Callable[[str], list[int]]  # a question to the tokens that an answer follows
    decode: Callable[[Sequence[int]], str]
    shown: Callable[[Row], str]  # a prompt as the judge reads it
    end_strings: tuple[str, ...]  # texts that end an evaluation, as the model's own end tokens do
    seed: int
    slots: int  # texts that a rank writes at once
    positions: int  # tokens of a question and its answer, at most

    def score(
        self, rollout: Rollout, prompts: Mapping[int, Row], *, text: Callable[[Rollout, int], str]
    ) -> Tensor:
        """Return [N] float32 on every rank: the mean of each response's scores. Called by all ranks.

        The evaluations follow from the texts and the weights alone, whatever the layout.

        Args:
            rollout: the whole one.
            prompts: those of this data parallel rank, by number; it scores the responses to them.
            text: of the response in a row.

        Raises:
            NotFinite: on every rank: a question leaves no room for an evaluation.
        """
        rows = [row for row, number in enumerate(map(int, rollout.group)) if number in prompts]
        asked = [
            self._question(self.shown(prompts[int(rollout.group[row])]), text(rollout, row)) for row in rows
        ]
        self._check_room(max((len(several[0].tokens) for several in asked), default=0))
        with world.phase("judging responses"), world.at_own_pace():
            written = self.policy.generate(
                [prompt for several in asked for prompt in several], self._sampling(), slots=self.slots
            )
        each = self.config.evaluations
        texts = [self.decode(written.response(i)) for i in range(len(rows) * each)]
        scores = [evaluation.read_score(text, self.config.pattern) for text in texts]
        mine = {row: scores[each * place : each * (place + 1)] for place, row in enumerate(rows)}
        every = collectives.merged_over_data_parallel(mine)
        self._report([score for several in every.values() for score in several])
        rewards = [
            evaluation.mean_score(every[row], low=self.config.low, high=self.config.high)
            for row in range(rollout.num_rows)
        ]
        return torch.tensor(rewards, dtype=torch.float32)

    def _check_room(self, longest: int) -> None:
        """Raise NotFinite on every rank if the longest question of some rank leaves too few positions."""
        (most,) = collectives.all_reduce_max([longest])
        if most + self.config.max_length > self.positions:
            error = UserError(
                f"a question to the judge has {int(most)} tokens, its answer up to {self.block}.max_length="
                f"{self.config.max_length}, and the model has {self.positions} positions for both",
                fix=f"give a shorter {self.block}.template, or set {self.block}.max_length or "
                "model.ppo.length_params.max_length lower",
            )
            raise NotFinite(error)

    def _question(self, prompt: str, response: str) -> list[Prompt]:
        tokens = self.encode(evaluation.fill(self.template, prompt=prompt, response=response))
        return [Prompt.by_content(tokens, sample=i) for i in range(self.config.evaluations)]

    def _sampling(self) -> SamplingConfig:
        return SamplingConfig(
            temperature=self.config.temperature,
            max_length=self.config.max_length,
            end_strings=self.end_strings,
            seed=self.seed,
        )

    def _report(self, scores: Sequence[float | None]) -> None:
        """Warn if much of what the judge writes is left out."""
        unread = sum(score is None for score in scores)
        outside = sum(
            score is not None and not self.config.low <= score <= self.config.high for score in scores
        )
        if (2 * unread > len(scores) or 10 * outside > len(scores)) and world.is_logging_rank():
            logger.warning(
                "of %d evaluations %d have no score, and %d one that is not from %g to %g: look at the judge's "
                "template, pattern, low, high and max_length; a small model may not be able to judge",
                *(len(scores), unread, outside, self.config.low, self.config.high),
            )
