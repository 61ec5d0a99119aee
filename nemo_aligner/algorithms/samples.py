# SPDX-License-Identifier: Apache-2.0
"""Responses to validation prompts, for people to read while a model learns."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nemo_aligner.algorithms.rollout import text_of_response
from nemo_aligner.data.loader import Rows
from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface
from nemo_aligner.models.sampling_config import SamplingConfig
from nemo_aligner.parallel import collectives, world
from nemo_aligner.rollout_batch import Prompt
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
        texts = {number: self.rows[number].sequences[0].split() for number in mine}
        prompts = [Prompt(tokens=prompt, number=number) for number, (prompt, _) in texts.items()]
        with world.phase("generation after validation"), world.at_own_pace():
            rollout = self.policy.generate(prompts, self.sampling, step=step)
        found = {
            number: {
                "prompt": self.decode(prompt),
                "response": text_of_response(rollout, row, self.end_ids, (), decode=self.decode),
                "expected": self.decode(expected),
            }
            for row, (number, (prompt, expected)) in enumerate(texts.items())
        }
        every = collectives.merged_over_data_parallel(found)
        run.log_rows(TABLE, [every[number] for number in numbers], step=step)
        if world.is_logging_rank():
            logger.info("response after step %d: %s⟦%s⟧", step, every[0]["prompt"], every[0]["response"])
