# SPDX-License-Identifier: Apache-2.0
"""Both sides of DPO's step of adapters: TRL's pairs and adapters are those of the peers' scripts, ours the same."""

import ast
from dataclasses import replace
from pathlib import Path

from benchmarks.lora_dpo import train
from benchmarks.processes import Measured
from benchmarks.reward_model import PAIRS
from benchmarks.sft import SHAPE

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def _call(script: str, name: str) -> ast.Call:
    calls = [
        node for node in ast.walk(ast.parse((BENCHMARKS / script).read_text())) if isinstance(node, ast.Call)
    ]
    return next(call for call in calls if ast.unparse(call.func).rpartition(".")[2] == name)


def _words(call: ast.Call) -> dict[str | None, str]:
    return {word.arg: ast.unparse(word.value).replace("peers.", "") for word in call.keywords}


def test_trl_has_the_adapters_of_its_fine_tuning():
    ours, peers = (_words(_call(script, "LoraConfig")) for script in ("trl_lora_dpo.py", "peers/trl_sft.py"))
    assert ours == peers


def test_trl_has_the_settings_of_its_dpo():
    ours, peers = (_words(_call(script, "mk")) for script in ("trl_lora_dpo.py", "peers/trl_dpo.py"))
    assert {name: ours[name] for name in ("max_length", "beta")} == {
        name: peers[name] for name in ("max_length", "beta")
    }


def test_our_side_prints_a_result_line():
    model = replace(SHAPE.model, hidden_size=64, ffn_hidden_size=48, num_layers=2, vocab_size=256)
    found = Measured.parse(train(replace(PAIRS, rows=4, warm_up=1, measured=2, model=model)))
    assert 0 < found.seconds_per_step < 60
