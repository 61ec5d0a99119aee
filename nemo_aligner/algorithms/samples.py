# SPDX-License-Identifier: Apache-2.0
"""Responses to validation prompts, for people to read while a model learns."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nemo_aligner.algorithms.rollout import text_of_response
from nemo_aligner.batch import Prompt
from nemo_aligner.data.loader import Rows
from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface
from nemo_aligner.models.sampling_config import SamplingConfig
from nemo_aligner.parallel import collectives, world
from nemo_aligner.run.experiment import Experiment

logger = logging.getLogger(__name__)

TABLE = "validation"


@dataclass(frozen=True, kw_only=True)
class ValidationResponses:
    """The model's responses to the prompts of the first rows, beside the rows' own."""

    policy: AlignableGenerativeInterface
    rows: Rows  # a row's prompt is what stands before the first token that is learned
    count: int  # rows
    sampling: SamplingConfig
    end_ids: Sequence[int]  # tokens that end a response
    decode: Callable[[Sequence[int]], str]

    def write(self, run: Experiment, *, step: int) -> None:
        """Generate, and write {prompt, response, expected} of each row to ``table_validation.jsonl``.

        Called by every rank; the first response is logged.
        """
        numbers = range(min(self.count, len(self.rows)))
        mine = numbers[world.dp_rank() :: world.dp_size()]
        texts = {number: self._prompt(number) for number in mine}
        prompts = [Prompt(tokens=prompt, number=number) for number, (prompt, _) in texts.items()]
        with world.phase("generation after validation"), world.at_own_pace():
            rollout = self.policy.generate(prompts, self.sampling, step=step, slots=max(1, len(prompts)))
        found: dict[int, dict[str, str]] = {}
        for row, (number, (prompt, expected)) in enumerate(texts.items()):
            response = text_of_response(rollout, row, self.end_ids, (), decode=self.decode)
            found[number] = {
                "prompt": self.decode(prompt),
                "response": response,
                "expected": self.decode(expected),
            }
        every: dict[int, dict[str, str]] = {}
        for part in collectives.all_gather_objects_dp(found):
            every |= part
        table = [every[number] for number in numbers]
        run.log_rows(TABLE, table, step=step)
        if world.is_logging_rank():
            logger.info("response after step %d: %s⟦%s⟧", step, table[0]["prompt"], table[0]["response"])

    def _prompt(self, number: int) -> tuple[list[int], list[int]]:
        """(prompt, the row's own response) as tokens."""
        sequence = self.rows[number].sequences[0]
        border = sequence.loss_mask.index(True)
        return sequence.tokens[:border], sequence.tokens[border:]
