# SPDX-License-Identifier: Apache-2.0
"""Our side of the step: the peers' model, as many operations as torch counts, loss tokens where they belong."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.processes import Measured
from benchmarks.sft import OPTIM, SHAPE, Shape, random_policy, rows, train
from nemo_aligner.parallel import world

PEERS = Path(__file__).parents[3] / "benchmarks/peers"
TINY = Shape(
    rows=2,
    length=16,
    warm_up=1,
    measured=2,
    model=replace(SHAPE.model, hidden_size=64, ffn_hidden_size=48, num_layers=2, vocab_size=256),
)


def llama(shape: Shape) -> LlamaForCausalLM:
    gpt = shape.model
    config = LlamaConfig(
        vocab_size=gpt.vocab_size,
        hidden_size=gpt.hidden_size,
        intermediate_size=gpt.ffn_hidden_size,
        num_hidden_layers=gpt.num_layers,
        num_attention_heads=gpt.num_attention_heads,
        num_key_value_heads=gpt.query_groups,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def test_the_shape_is_the_peers():
    tree = ast.parse((PEERS / "trl_common.py").read_text())
    constants = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "(SEQ, MB, WARM, MEAS)"
    )
    assert ast.literal_eval(constants) == (SHAPE.length, SHAPE.rows, SHAPE.warm_up, SHAPE.measured)
    call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "LlamaConfig")
    theirs = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg is not None}
    gpt = SHAPE.model
    assert (gpt.vocab_size, gpt.hidden_size, gpt.ffn_hidden_size, gpt.num_layers) == tuple(
        theirs[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    )
    assert (gpt.num_attention_heads, gpt.num_query_groups) == (
        theirs["num_attention_heads"],
        theirs["num_key_value_heads"],
    )


def test_operations_are_those_that_torch_counts():
    model = llama(TINY)
    tokens = torch.zeros(TINY.rows, TINY.length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens).logits.sum().backward()
    # Eager attention computes its whole square; ours is counted by the half that is visible.
    gpt = TINY.model
    hidden_half = 6 * gpt.num_layers * TINY.rows * TINY.length**2 * gpt.hidden_size
    assert TINY.flops(TINY.length) == counter.get_total_flops() - hidden_half
    mlp = 6 * 3 * gpt.hidden_size * gpt.ffn_hidden_size
    assert TINY.flops(3) - TINY.flops(3, read=2) == TINY.rows * (TINY.length - 2) * mlp


def test_the_model_has_as_many_weights_as_transformers():
    with world.ensure_single_process():
        ours = random_policy(TINY, OPTIM).model
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in llama(TINY).parameters())


@pytest.mark.parametrize("learned", [15, 4])
def test_only_the_end_of_a_row_is_learned(learned: int):
    batch = next(rows(TINY, learned=learned))
    assert batch.loss_tokens().sum(1).tolist() == [learned] * TINY.rows
    assert batch.lengths.sum() == TINY.tokens


def test_our_side_prints_a_result_line():
    found = Measured.parse(train(TINY, learned=4))
    assert 0 < found.seconds_per_step < 60
    assert found.peak_gib > 0
