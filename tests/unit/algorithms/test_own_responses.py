# SPDX-License-Identifier: Apache-2.0
"""Pairs of the rows' responses and those that a policy writes to the same prompts."""

from collections.abc import Sequence

import torch

from nemo_aligner.algorithms.own_responses import OwnResponses
from nemo_aligner.algorithms.ppo_config import ResponseConfig
from nemo_aligner.batch import PreferenceBatch, TokenBatch
from nemo_aligner.data.collate import collate
from nemo_aligner.data.loader import BatchLoader
from nemo_aligner.data.row import Row, TokenSequence
from nemo_aligner.data.sampler import GlobalBatchSampler
from nemo_aligner.models.sampling_config import SamplingConfig
from nemo_aligner.rollout_batch import Prompt, Rollout

ROWS = [([5, 6], [7, 8, 2]), ([9], [7, 2])]  # prompt, response


class Writer:
    """A policy that responds to each prompt with its first token, as often as there is room, at most thrice."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[Prompt], int, int]] = []

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, step: int, slots: int
    ) -> Rollout:
        self.asked.append(([*prompts], step, slots))
        rows = []
        for prompt in prompts:
            written = [prompt.tokens[0]] * min(3, prompt.max_length or 3)
            rows.append(([*prompt.tokens, *written], [False] * len(prompt.tokens) + [True] * len(written)))
        batch = TokenBatch.from_rows(rows, pad_id=0, seq_length=sampling.max_length + 8)
        count = len(prompts)
        return batch.extended(
            Rollout,
            prompt_lengths=torch.tensor([len(prompt.tokens) for prompt in prompts]),
            finished=torch.zeros(count, dtype=torch.bool),
            group=torch.arange(count),
            sampler_logprobs=torch.zeros(batch.tokens.shape),
        )


def rows() -> list[Row]:
    return [
        Row(sequences=(TokenSequence(tokens=[*ask, *say], loss_mask=[False] * len(ask) + [True] * len(say)),))
        for ask, say in ROWS
    ]


def own(policy: Writer, *, max_length: int) -> OwnResponses:
    loader = BatchLoader(
        rows(),
        GlobalBatchSampler(2, 2, shuffle=False, seed=0, drop_last=False),
        collate=collate,
        dp_rank=0,
        dp_size=1,
        micro_batch_size=3,
        pad_id=0,
        multiple=1,
        max_length=max_length,
    )
    return OwnResponses(
        policy=policy, config=ResponseConfig(), loader=loader, seed=1, slots=4, scoring_rows=None
    )


def test_the_rows_response_is_chosen_and_the_policys_rejected():
    policy = Writer()
    responses = own(policy, max_length=8)
    (pairs,) = responses.paired(responses.loader.batch(0), draw=3)
    assert isinstance(pairs, PreferenceBatch)
    assert pairs.tokens[:4].tolist() == [[5, 6, 7, 8, 2], [5, 6, 5, 5, 5], [9, 7, 2, 0, 0], [9, 9, 9, 9, 0]]
    assert pairs.loss_lengths()[:4].tolist() == [3, 3, 2, 3]
    # The third row of the micro-batch is padding: it asks nothing, and makes no pair.
    assert pairs.real_pairs().tolist() == [True, True, False]
    ((prompts, step, slots),) = policy.asked
    assert ([prompt.tokens for prompt in prompts], step, slots) == ([[5, 6], [9]], 3, 4)


def test_a_response_has_the_room_that_its_prompt_leaves():
    policy = Writer()
    responses = own(policy, max_length=5)
    responses.paired(responses.loader.batch(0), draw=0)
    ((prompts, _, _),) = policy.asked
    assert [prompt.max_length for prompt in prompts] == [3, 4]
    assert prompts[0].number == Prompt.by_content([5, 6]).number, "draws follow from the prompt alone"
