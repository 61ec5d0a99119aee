# SPDX-License-Identifier: Apache-2.0
"""Work is dealt out so that ranks have alike much of it."""

import random

import pytest
import torch

from nemo_aligner.algorithms.rollout import balance_micro_batches, gather_rollouts, text_of_response
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.model import build_gpt
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.models.sampling_config import SamplingConfig
from nemo_aligner.parallel import world
from nemo_aligner.parallel.ranks import Layout
from nemo_aligner.rollout_batch import Prompt, Rollout


@pytest.mark.parametrize(("count", "rows", "ranks"), [(16, 2, 4), (17, 4, 3), (3, 1, 4), (64, 8, 8)])
def test_each_row_is_dealt_once_and_ranks_ask_equally_often(count: int, rows: int, ranks: int):
    draw = random.Random(0)
    lengths = [draw.randint(1, 500) for _ in range(count)]
    shares = balance_micro_batches(lengths, rows=rows, ranks=ranks)
    assert len({len(share) for share in shares}) == 1
    assert sorted(row for share in shares for micro in share for row in micro) == list(range(count))
    assert all(len(micro) <= rows for share in shares for micro in share)


def test_ranks_have_alike_many_tokens():
    draw = random.Random(1)
    lengths = [int(draw.lognormvariate(5, 0.6)) for _ in range(256)]
    tokens = [
        sum(lengths[row] for micro in share for row in micro)
        for share in balance_micro_batches(lengths, rows=1, ranks=8)
    ]
    in_order = [sum(lengths[rank * 32 : (rank + 1) * 32]) for rank in range(8)]
    assert max(tokens) - min(tokens) < 0.25 * (max(in_order) - min(in_order))


@pytest.mark.parametrize(
    ("letters", "finished", "text"),
    [
        ("a!b!!", True, "a!b!"),
        ("a!b!", False, "a!b!"),
        ("ab.", True, "ab"),
        ("ab.", False, "ab."),
        ("", False, ""),
    ],
)
def test_the_text_of_a_response_is_without_what_ended_it(letters: str, finished: bool, text: str):
    """The end token is "." and the end string "!"; a response that the limit cut has neither."""
    tokens = torch.tensor([[0, *map(ord, letters)]])
    rollout = Rollout(
        tokens=tokens,
        loss_mask=torch.arange(tokens.shape[1])[None] > 0,
        lengths=torch.tensor([tokens.shape[1]]),
        prompt_lengths=torch.tensor([1]),
        finished=torch.tensor([finished]),
        group=torch.tensor([0]),
        sampler_logprobs=torch.zeros(tokens.shape),
    )
    decode = "".join
    found = text_of_response(rollout, 0, [ord(".")], ["!"], decode=lambda ids: decode(map(chr, ids)))
    assert found == text


@pytest.mark.parametrize(
    ("pieces", "ends", "text"),
    [
        (["foo", "\n\n"], ["\n"], "foo"),
        (["foo", "###"], ["##"], "foo"),
        (["foo", "###"], ["###", "#"], "foo"),
        (["a#", "b#"], ["#"], "a#b"),  # the first one came before min_length
        (["foo", "d\n", "\nbar"], ["\n\n"], "food"),
    ],
)
def test_an_end_string_is_cut_where_the_last_token_completes_it(
    pieces: list[str], ends: list[str], text: str
):
    tokens = torch.arange(len(pieces) + 1)[None]
    rollout = Rollout(
        tokens=tokens,
        loss_mask=tokens > 0,
        lengths=torch.tensor([tokens.shape[1]]),
        prompt_lengths=torch.tensor([1]),
        finished=torch.tensor([True]),
        group=torch.tensor([0]),
        sampler_logprobs=torch.zeros(tokens.shape),
    )
    found = text_of_response(rollout, 0, [], ends, decode=lambda ids: "".join(pieces[i - 1] for i in ids))
    assert found == text


def test_a_rollout_is_padded_to_at_least_what_is_asked_for(caplog: pytest.LogCaptureFixture):
    config = GPTConfig(num_layers=1, hidden_size=8, num_attention_heads=2, ffn_hidden_size=8, vocab_size=11)
    with world.ensure_single_process():
        policy = GPTPolicy(build_gpt(config, Layout(), torch.float32))
        for weight in policy.model.parameters():
            torch.nn.init.normal_(weight, std=0.1)
        prompts, sampling = [Prompt(tokens=[1, 2, 3], number=0)], SamplingConfig(max_length=5)
        widths = [
            gather_rollouts(policy, prompts, sampling, draw=0, slots=1, seq_length=asked).seq_length
            for asked in (None, 12, 6)
        ]
    assert widths == [8, 12, 8]
    assert "8 tokens, more than trainer.ppo.rollout_batch_seq_length=6" in caplog.text
