# SPDX-License-Identifier: Apache-2.0
"""Our side of DPO's step: the peer's pairs, its tokens, and limits on the ratio of speeds."""

import ast
from dataclasses import replace
from pathlib import Path

from benchmarks.dpo import FLOORS, OURS, TRL, figures_of, pairs, train
from benchmarks.processes import Measured
from benchmarks.reward_model import PAIRS
from benchmarks.sft import SHAPE

PEERS = Path(__file__).parents[3] / "benchmarks/peers"


def test_tokens_are_counted_as_the_peer_counts_them():
    calls = [
        node for node in ast.walk(ast.parse((PEERS / "trl_dpo.py").read_text())) if isinstance(node, ast.Call)
    ]
    timer = next(call for call in calls if ast.unparse(call.func) == "Timer")
    assert ast.unparse(timer.args[1]) == "2 * MB * SEQ"
    assert 2 * SHAPE.rows * SHAPE.length == PAIRS.tokens


def test_pairs_share_a_prompt_of_which_nothing_is_learned():
    batch = next(pairs(PAIRS))
    half = PAIRS.length // 2
    assert batch.tokens.shape == (PAIRS.rows, PAIRS.length)
    assert batch.loss_lengths().tolist() == [half] * PAIRS.rows
    assert (batch.tokens[::2, :half] == batch.tokens[1::2, :half]).all()
    assert (batch.tokens[::2, half:] != batch.tokens[1::2, half:]).any(1).all()


def test_our_side_prints_a_result_line():
    model = replace(SHAPE.model, hidden_size=64, ffn_hidden_size=48, num_layers=2, vocab_size=256)
    found = Measured.parse(train(replace(PAIRS, rows=4, warm_up=1, measured=2, model=model)))
    assert 0 < found.seconds_per_step < 60


def test_the_ratio_of_speeds_has_a_limit_with_each_allocator():
    found = figures_of(
        {
            (side, allocator): [
                Measured(
                    seconds_per_step=seconds, cpu_seconds_per_step=1.0, page_faults_per_step=1.0, peak_gib=1.0
                )
            ]
            for side, seconds in {OURS: 1.0, TRL: 2.5}.items()
            for allocator in FLOORS
        },
        [200.0],
    )
    assert [f.values for f in found if f.metric == "ratio of tokens/s"] == [(2.5,)] * 2
    limits = {f.subject: f.values for f in found if f.metric == "at least"}
    assert limits == {f"{OURS} / {TRL}, {allocator}": (floor,) for allocator, floor in FLOORS.items()}
