# SPDX-License-Identifier: Apache-2.0
"""Our side of a step of adapters: the peer's rank and scale, and limits on the ratio of speeds."""

import ast
from dataclasses import replace
from pathlib import Path

from benchmarks.lora import ADAPTERS, FLOOR, OURS, TRL, figures_of, train
from benchmarks.processes import ALLOCATORS, Measured
from benchmarks.sft import SHAPE

PEERS = Path(__file__).parents[3] / "benchmarks/peers"


def test_adapters_are_the_peers():
    calls = [
        node for node in ast.walk(ast.parse((PEERS / "trl_sft.py").read_text())) if isinstance(node, ast.Call)
    ]
    theirs = next(call for call in calls if ast.unparse(call.func) == "LoraConfig")
    asked = {word.arg: ast.literal_eval(word.value) for word in theirs.keywords}
    assert (asked["r"], asked["lora_alpha"]) == (ADAPTERS.adapter_dim, ADAPTERS.alpha)
    assert asked["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert ADAPTERS.target_modules == ("attention_qkv", "attention_dense")


def test_our_side_prints_a_result_line():
    model = replace(SHAPE.model, hidden_size=64, ffn_hidden_size=48, num_layers=2, vocab_size=256)
    found = Measured.parse(train(replace(SHAPE, rows=2, warm_up=1, measured=2, model=model)))
    assert 0 < found.seconds_per_step < 60


def test_the_ratio_of_speeds_has_a_limit():
    found = figures_of(
        {
            (side, allocator): [
                Measured(
                    seconds_per_step=seconds, cpu_seconds_per_step=1.0, page_faults_per_step=1.0, peak_gib=1.0
                )
            ]
            for side, seconds in {OURS: 1.0, TRL: 1.75}.items()
            for allocator in ALLOCATORS
        },
        [200.0],
    )
    assert [f.values for f in found if f.metric == "ratio of tokens/s"] == [(1.75,)] * 2
    assert [f.values for f in found if f.metric == "at least"] == [(FLOOR,)] * 2
