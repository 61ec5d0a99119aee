# SPDX-License-Identifier: Apache-2.0
"""Our side of the step: the peer's pairs and model, its tokens, and a limit on the ratio of speeds."""

import ast
from dataclasses import replace
from pathlib import Path

from transformers import LlamaConfig, LlamaForSequenceClassification

from benchmarks.generation import sizes
from benchmarks.processes import ALLOCATORS, Measured
from benchmarks.reward_model import FLOOR, OURS, PAIRS, TRL, figures_of, pairs, random_reward_model, train
from benchmarks.sft import OPTIM, SHAPE, Shape
from nemo_aligner.parallel import world

PEERS = Path(__file__).parents[3] / "benchmarks/peers"
TINY = Shape(
    rows=4,
    length=16,
    warm_up=1,
    measured=2,
    model=replace(SHAPE.model, hidden_size=64, ffn_hidden_size=48, num_layers=2, vocab_size=256),
)


def test_tokens_are_counted_as_the_peer_counts_them():
    calls = [
        node for node in ast.walk(ast.parse((PEERS / "trl_rm.py").read_text())) if isinstance(node, ast.Call)
    ]
    timer = next(call for call in calls if ast.unparse(call.func) == "Timer")
    assert ast.unparse(timer.args[1]) == "2 * MB * SEQ"
    assert 2 * SHAPE.rows * SHAPE.length == PAIRS.tokens


def test_pairs_are_full_rows_that_are_judged_at_their_end():
    batch = next(pairs(TINY))
    assert batch.tokens.shape == (4, 16)
    assert batch.lengths.sum() == TINY.tokens
    assert batch.loss_mask.nonzero().tolist() == [[row, 15] for row in range(4)]


def test_the_model_has_as_many_weights_as_transformers():
    with world.ensure_single_process():
        ours = random_reward_model(TINY, OPTIM).model
    theirs = LlamaForSequenceClassification(LlamaConfig(**sizes(TINY.model), num_labels=1))
    # Our head has a bias.
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) + 1


def test_our_side_prints_a_result_line():
    found = Measured.parse(train(TINY))
    assert 0 < found.seconds_per_step < 60


def test_the_ratio_of_speeds_has_a_limit_with_the_default_allocator():
    def measured(seconds: float) -> Measured:
        return Measured(
            seconds_per_step=seconds, cpu_seconds_per_step=1.0, page_faults_per_step=1.0, peak_gib=1.0
        )

    sides = {OURS: 1.0, TRL: 1.5}
    found = figures_of(
        {(side, allocator): [measured(sides[side])] for side in sides for allocator in ALLOCATORS}, [200.0]
    )
    ratios = [f for f in found if f.metric == "ratio of tokens/s"]
    assert [f.values for f in ratios] == [(1.5,)] * 2
    (limit,) = (f for f in found if f.metric == "at least")
    assert (limit.values, limit.subject) == ((FLOOR,), f"{OURS} / {TRL}, default allocator")
