# SPDX-License-Identifier: Apache-2.0
"""Rewards by the policy itself, which is asked to score its responses in words."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nemo_aligner.algorithms.ppo_config import JudgeConfig
from nemo_aligner.algorithms.skips import NotFinite
from nemo_aligner.data.row import Row
from nemo_aligner.errors import UserError
from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface
from nemo_aligner.models.sampling_config import SamplingConfig
from nemo_aligner.parallel import collectives, world
from nemo_aligner.rollout_batch import Prompt, Rollout

logger = logging.getLogger(__name__)

_USUAL = """Judge how well the response below answers the question.

Question:
{prompt}

Response:
{response}

Give one point each if the response
- is about the question,
- covers a good part of what is asked,
- answers the main point in a way that helps,
- is clear, well ordered and complete,
- is what an expert would have written, with nothing beside the point.

Write one or two sentences of reasons. Then end with "Score: " and the sum of the points, from 0 to 5.
"""


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
        scores = [read_score(self.config, self.decode(written.response(i))) for i in range(len(rows) * each)]
        mine = {row: scores[each * place : each * (place + 1)] for place, row in enumerate(rows)}
        every = collectives.merged_over_data_parallel(mine)
        self._report([score for several in every.values() for score in several])
        rewards = [mean_score(self.config, every[row]) for row in range(rollout.num_rows)]
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
        tokens = self.encode(fill(self.template, prompt=prompt, response=response))
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
        outside = sum(score is not None and not _fits(self.config, score) for score in scores)
        if (2 * unread > len(scores) or 10 * outside > len(scores)) and world.is_logging_rank():
            logger.warning(
                "of %d evaluations %d have no score, and %d one that is not from %g to %g: look at the judge's "
                "template, pattern, low, high and max_length; a small model may not be able to judge",
                *(len(scores), unread, outside, self.config.low, self.config.high),
            )


def fill(template: str, *, prompt: str, response: str) -> str:
    """The template with both texts in it, whatever braces these have.

    >>> fill("Q: {prompt} A: {response}", prompt="{response}?", response="{x}")
    'Q: {response}? A: {x}'
    """
    texts = {"{prompt}": prompt, "{response}": response}
    return re.sub(r"\{prompt\}|\{response\}", lambda match: texts[match[0]], template)


def read_template(path: str | None, *, setting: str) -> str:
    """The text of the file, or the usual one.

    Raises:
        UserError: the file cannot be read, or lacks {prompt} or {response}.
    """
    if path is None:
        return _USUAL
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{setting}={path} cannot be read: {error}", fix="give a text file in UTF-8"
        ) from error
    missing = [name for name in ("{prompt}", "{response}") if name not in text]
    if missing:
        raise UserError(
            f"{setting}={path} has no {missing[0]}", fix=f"write {missing[0]} where that text belongs"
        )
    return text


def read_score(config: JudgeConfig, evaluation: str) -> float | None:
    """The last score in a text, in range or not; None if there is none."""
    found = re.findall(config.pattern, evaluation)
    try:
        return float(found[-1])
    except (IndexError, ValueError):
        return None


def mean_score(config: JudgeConfig, scores: Sequence[float | None]) -> float:
    """The mean of those in range; the lowest score if there are none."""
    known = [score for score in scores if score is not None and _fits(config, score)]
    return sum(known) / len(known) if known else config.low


def _fits(config: JudgeConfig, score: float) -> bool:
    return config.low <= score <= config.high
