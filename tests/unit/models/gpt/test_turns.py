# SPDX-License-Identifier: Apache-2.0
"""Responses of several turns: what is written goes on from all that stands before, and only that is learned."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from echo import Echo

from nemo_aligner.batch import TokenBatch
from nemo_aligner.models.gpt.model import GPT
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.models.sampling_config import SamplingConfig
from nemo_aligner.rollout_batch import Prompt
from tests.unit.models.gpt.test_generate import CONFIG, SAMPLINGS, Letters, numbered, responses


@pytest.fixture(scope="module")
def prompts(random_rows: Callable[..., TokenBatch]) -> list[Prompt]:
    batch = random_rows([1 + 5 * i % 13 for i in range(12)], seed=8)
    tokens = [row[:n].tolist() for row, n in zip(batch.tokens, batch.lengths, strict=True)]
    return [Prompt(tokens=t, number=100 + i // 2, sample=i % 2) for i, t in enumerate(tokens)]


@pytest.fixture(scope="module")
def policy(random_model: Callable[..., GPT], prompts: list[Prompt]) -> GPTPolicy:
    """A model whose greedy turns are short, too: it ends them at tokens that it writes."""
    model = random_model(CONFIG)
    greedy = SamplingConfig(use_greedy=True, max_length=6)
    written = responses(GPTPolicy(model).generate(prompts, greedy))
    return GPTPolicy(model, end_ids=sorted({row[4] for row in written}), detokenizer=Letters())


def test_each_turn_is_that_of_the_whole_text_before_it(policy: GPTPolicy, prompts: list[Prompt]):
    greedy = SamplingConfig(use_greedy=True, max_length=24)
    expected, masks = [], []
    for prompt in prompts:
        echo, text, mask, room, said = Echo(), list(prompt.tokens), [False] * len(prompt.tokens), 24, []
        while room > 0:
            sampling = replace(greedy, max_length=room)
            one = policy.generate(numbered([text]), sampling)
            (turn,) = responses(one)
            text, mask, room = text + turn, mask + [True] * len(turn), room - len(turn)
            said.append(turn)
            reply = echo.reply(said) if one.finished[0] else None
            if reply is None or room == 0:
                break
            text, mask = text + reply, mask + [False] * len(reply)
        expected.append(text)
        masks.append(mask)
    assert max(mask.count(False) for mask in masks) > 13 + 3, "some have several turns"
    for slots in (64, 5, 1):
        found = policy.generate(prompts, greedy, slots=slots, turns=Echo(seed=slots))
        assert [row[:n].tolist() for row, n in zip(found.tokens, found.lengths, strict=True)] == expected
        assert [row[:n].tolist() for row, n in zip(found.loss_mask, found.lengths, strict=True)] == masks
        assert torch.equal(found.sampler_logprobs != 0, found.loss_mask)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_draws_do_not_depend_on_when_replies_come(policy: GPTPolicy, prompts: list[Prompt], name: str):
    found = [
        policy.generate(prompts, SAMPLINGS[name], slots=slots, turns=Echo(seed=slots)) for slots in (64, 3)
    ]
    assert torch.equal(found[0].tokens, found[1].tokens)
    assert torch.equal(found[0].loss_mask, found[1].loss_mask)
    assert torch.equal(found[0].finished, found[1].finished)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_trainer_believes_each_turn(policy: GPTPolicy, prompts: list[Prompt], name: str):
    rollout = policy.generate(prompts, SAMPLINGS[name], slots=6, turns=Echo())
    begins = rollout.loss_mask & ~rollout.loss_mask.roll(1, 1)
    assert int(begins.sum(1).max()) == 3
    found = policy.logprobs(rollout, SAMPLINGS[name])
    apart = (found - rollout.sampler_logprobs)[rollout.loss_mask].abs()
    assert float(apart.max()) < 0.02
    assert float((apart < 1e-4).float().mean()) > 0.99


def test_a_response_is_finished_where_the_other_side_ends_it(policy: GPTPolicy, prompts: list[Prompt]):
    sampling = SamplingConfig(max_length=30, temperature=1.3)
    echo = Echo(turns=2)
    rollout = policy.generate(prompts, sampling, turns=echo)
    for row, prompt in enumerate(prompts):
        heard = echo.heard.get((prompt.number, prompt.sample), [])
        assert bool(rollout.finished[row]) == (len(heard) == 2)
        own = rollout.response(row)
        assert own[: sum(map(len, heard))] == [token for turn in heard for token in turn]
        assert rollout.finished[row] or len(own) == 30 or int(rollout.lengths[row]) == 96


def test_positions_cut_a_conversation(random_model: Callable[..., GPT], prompts: list[Prompt]):
    policy = GPTPolicy(random_model(replace(CONFIG, max_position_embeddings=24)), end_ids=range(50))
    rollout = policy.generate(prompts, SamplingConfig(max_length=90), turns=Echo(turns=50))
    assert int(rollout.lengths.max()) <= 24
    assert not rollout.finished.any()
