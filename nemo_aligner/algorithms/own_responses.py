# SPDX-License-Identifier: Apache-2.0
"""Pairs of a supervised row's own response and one that the policy writes to the same prompt.

The policy writes as its reference, which may be renewed in the course of a run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_aligner.algorithms.ppo_config import ResponseConfig
from nemo_aligner.algorithms.reference import RenewedReference, referenced
from nemo_aligner.batch import ReferencedPairs, TokenBatch
from nemo_aligner.data.loader import BatchLoader
from nemo_aligner.data.row import Row, TokenSequence
from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface
from nemo_aligner.parallel import world
from nemo_aligner.rollout_batch import Prompt


@dataclass(frozen=True, kw_only=True)
class OwnResponses:
    """Writes a response to each row of a batch, and pairs it with the one that the row has.

    Where the policy becomes the reference after a pass or more over the data this is self-play fine-tuning (SPIN; Chen
    2024, arXiv 2401.01335, algorithm 1). A reference writes one response to a prompt.
    """

    policy: AlignableGenerativeInterface
    config: ResponseConfig
    loader: BatchLoader[TokenBatch]  # of the rows: pairs are padded, and as long at most, as its batches
    seed: int  # of the draws
    slots: int  # responses that a rank generates at once
    scoring_rows: int | None  # pairs of a forward pass of the reference; None: as they come

    def annotate(self, reference: RenewedReference, batches: Sequence[TokenBatch]) -> list[ReferencedPairs]:
        """Return pairs of the rows' responses and the reference's, with the reference's log-probs of both."""
        with self.policy.as_reference():
            pairs = self.paired(batches, draw=reference.number)
            return referenced(self.policy, pairs, self.scoring_rows)

    def paired(self, batches: Sequence[TokenBatch], *, draw: int) -> list[TokenBatch]:
        """Return PreferenceBatches: the row's response is the chosen one, the policy's the rejected one.

        The draws follow from ``draw`` and the prompt's tokens, whatever the step and the layout.
        """
        rows = [_sequences(batch) for batch in batches]
        with world.phase("writing responses to rows"), world.at_own_pace():
            written = iter(self._write([row for micro in rows for row in micro], draw))
        return self.loader.collated(
            [[Row(sequences=(row, next(written))) for row in micro] for micro in rows]
        )

    def _write(self, rows: Sequence[TokenSequence], draw: int) -> list[TokenSequence]:
        """The policy's response to the prompt of each row; a padding row stands for its own."""
        asked = [place for place, row in enumerate(rows) if any(row.loss_mask)]
        prompts = [self._prompt(rows[place]) for place in asked]
        sampling = self.config.sampling(max_length=self.loader.max_length, seed=self.seed)
        rollout = self.policy.generate(prompts, sampling, step=draw, slots=self.slots)
        written = list(rows)
        for number, (place, prompt) in enumerate(zip(asked, prompts, strict=True)):
            response = rollout.response(number)
            mask = [False] * len(prompt.tokens) + [True] * len(response)
            written[place] = TokenSequence(tokens=[*prompt.tokens, *response], loss_mask=mask)
        return written

    def _prompt(self, row: TokenSequence) -> Prompt:
        prompt, _ = row.split()
        return Prompt.by_content(prompt, max_length=self.loader.max_length - len(prompt))


def _sequences(batch: TokenBatch) -> list[TokenSequence]:
    """The rows of a batch that is not packed, without what pads them."""
    found: list[TokenSequence] = []
    for row, length in enumerate(map(int, batch.lengths)):
        tokens, mask = map(int, batch.tokens[row, :length]), map(bool, batch.loss_mask[row, :length])
        found.append(TokenSequence(tokens=[*tokens], loss_mask=[*mask]))
    return found
