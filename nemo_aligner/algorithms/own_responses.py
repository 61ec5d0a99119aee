# SPDX-License-Identifier: Apache-2.0
"""Pairs of a supervised row's own response and one that the policy writes to the same prompt.

The policy writes as its reference, which may be renewed in the course of a run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nemo_aligner.algorithms.reference import referenced
from nemo_aligner.batch import Prompt, ReferencedPairs, TokenBatch
from nemo_aligner.data.collate import collate, common_lengths
from nemo_aligner.data.row import Row, TokenSequence
from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface
from nemo_aligner.models.sampling_config import SamplingConfig
from nemo_aligner.parallel import world


@dataclass(frozen=True, kw_only=True)
class OwnResponses:
    """Writes a response to each row of a batch, and pairs it with the one that the row has."""

    policy: AlignableGenerativeInterface
    sampling: SamplingConfig
    slots: int  # responses that a rank writes at once
    pad_id: int
    multiple: int  # lengths are rounded up to a multiple of this many tokens
    max_length: int  # tokens of a prompt and its response
    one_length: bool  # pad all micro-batches of a step alike, as pipeline stages need

    def paired(self, batches: Sequence[TokenBatch], *, draw: int) -> list[TokenBatch]:
        """Return PreferenceBatches: the row's response is the chosen one, the policy's the rejected one.

        The draws follow from ``draw`` and the prompt's tokens, whatever the step and the layout.
        """
        rows = [_sequences(batch) for batch in batches]
        with world.phase("writing responses to rows"), world.at_own_pace():
            written = iter(self._write([row for micro in rows for row in micro], draw))
        pairs = [[Row(sequences=(row, next(written))) for row in micro] for micro in rows]
        lengths = common_lengths(
            pairs, one_length=self.one_length, multiple=self.multiple, maximum=self.max_length
        )
        return [
            collate(micro, pad_id=self.pad_id, seq_length=length)
            for micro, length in zip(pairs, lengths, strict=True)
        ]

    def _write(self, rows: Sequence[TokenSequence], draw: int) -> list[TokenSequence]:
        """The policy's response to the prompt of each row; a padding row stands for its own."""
        asked = [place for place, row in enumerate(rows) if any(row.loss_mask)]
        prompts = [self._prompt(rows[place]) for place in asked]
        rollout = self.policy.generate(prompts, self.sampling, step=draw, slots=self.slots)
        written = list(rows)
        for number, (place, prompt) in enumerate(zip(asked, prompts, strict=True)):
            response = rollout.response(number)
            mask = [False] * len(prompt.tokens) + [True] * len(response)
            written[place] = TokenSequence(tokens=[*prompt.tokens, *response], loss_mask=mask)
        return written

    def _prompt(self, row: TokenSequence) -> Prompt:
        prompt, _ = row.split()
        return Prompt.by_content(prompt, max_length=self.max_length - len(prompt))


@dataclass(kw_only=True)
class OwnPairs:
    """Makes the pairs of a run whose reference becomes the policy as it is, every so many steps.

    With a pass or more over the data between two references this is self-play fine-tuning (SPIN; Chen 2024, arXiv
    2401.01335, algorithm 1): the reference is the opponent of an iteration. It writes one response to a prompt in it.
    """

    responses: OwnResponses
    renew_every: int  # steps of an iteration
    iteration: int  # whose reference the policy keeps, from 0
    renew: Callable[[int], None]  # makes the policy as it is now the reference of the iteration
    pairs: int | None  # of a forward pass for log-probs; None: a micro-batch

    def before_step(self, step: int) -> None:
        """Begin the iteration of ``step``, if it is its first."""
        iteration = iteration_of(step, self.renew_every)
        if iteration != self.iteration:
            self.renew(iteration)
            self.iteration = iteration

    def annotate(self, batches: Sequence[TokenBatch]) -> list[ReferencedPairs]:
        """Return pairs of the rows' responses and the reference's, with the reference's log-probs of both."""
        policy = self.responses.policy
        with policy.as_reference():
            return referenced(policy, self.responses.paired(batches, draw=self.iteration), self.pairs)


def iteration_of(step: int, renew_every: int) -> int:
    """The iteration, from 0, of a step, from 1.

    >>> [iteration_of(step, 3) for step in (1, 3, 4, 7)]
    [0, 0, 1, 2]
    """
    return (step - 1) // renew_every


def _sequences(batch: TokenBatch) -> list[TokenSequence]:
    """The rows of a batch that is not packed, without what pads them."""
    found: list[TokenSequence] = []
    for row, length in enumerate(map(int, batch.lengths)):
        tokens, mask = batch.tokens[row, :length], batch.loss_mask[row, :length]
        found.append(
            TokenSequence(tokens=[int(token) for token in tokens], loss_mask=[bool(x) for x in mask])
        )
    return found
