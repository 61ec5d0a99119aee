# SPDX-License-Identifier: Apache-2.0
"""Both sides write responses of the same lengths to the same prompts, greedily the same ones; ratios are of ours."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks import sft
from benchmarks.figures import Figure
from benchmarks.generation import (
    CEILING,
    FAR,
    FLOORS,
    NEAR,
    OURS,
    RESPONSE,
    ROUNDS,
    THEIRS,
    Case,
    cases,
    figures_of,
    load,
    sizes,
    uneven,
    written,
)
from benchmarks.processes import ALLOCATORS
from benchmarks.transformers_generate import LlamaForCausalLM, generate, measured, save
from nemo_aligner.checkpoint.convert import import_from_huggingface
from nemo_aligner.parallel import world

TINY = replace(sft.MODEL, hidden_size=64, ffn_hidden_size=48, num_layers=2, vocab_size=256)
LENGTHS = [9, 2, 1, 7, 5]
CASE = Case(
    batch=2,
    manner="greedy, uneven",
    greedy=True,
    steps=False,
    prompts=[[4 + i, 70 + 3 * i, 9, 30 + i] for i in range(len(LENGTHS))],
    lengths=LENGTHS,
)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    save(folder, sizes(TINY))
    return folder


def test_both_sides_write_the_same(theirs: Path, tmp_path: Path):
    import_from_huggingface(theirs, str(tmp_path / "x.nemo"))
    with world.ensure_single_process():
        ours, _ = written(load(tmp_path / "x.nemo"), CASE)
    assert [len(response) for response in ours] == LENGTHS
    batches = generate(LlamaForCausalLM.from_pretrained(theirs).eval(), asdict(CASE))
    # Each batch of two goes on until its longer response has ended.
    assert [out.shape[1] - 4 for out, _ in batches] == [9, 7, 5]
    rows = [row[4:].tolist() for out, _ in batches for row in out]
    assert [row[:n] for row, n in zip(rows, LENGTHS, strict=True)] == ours


def test_no_response_of_theirs_ends_before_its_length(theirs: Path):
    # The weights would draw an end token once in a few hundred tokens, and generate's own check of lengths would stop.
    model = LlamaForCausalLM.from_pretrained(theirs).eval()
    sampled = asdict(replace(CASE, greedy=False)) | {"prompts": CASE.prompts * 50, "lengths": LENGTHS * 50}
    assert len(generate(model, sampled)) == 125


@pytest.mark.parametrize("steps", [False, True])
def test_their_side_is_timed(theirs: Path, steps: bool):
    case = json.loads(json.dumps(asdict(replace(CASE, steps=steps, greedy=steps))))
    assert 0 < measured(LlamaForCausalLM.from_pretrained(theirs).eval(), case) < 60


def test_uneven_responses_are_a_third_as_long_on_average():
    for count in (ROUNDS * 16, ROUNDS * 64):
        lengths = uneven(count)
        assert min(lengths) == 1
        assert max(lengths) == RESPONSE
        assert abs(sum(lengths) / count / RESPONSE - 1 / 3) < 0.02
        assert lengths == uneven(count) != sorted(lengths)


def test_texts_fit_the_model_and_steps_are_of_their_length():
    for case in cases():
        longest = len(case.prompts[0]) + max(case.lengths)
        assert longest <= sft.MODEL.max_position_embeddings
        if case.steps:
            assert (len(case.prompts[0]) + longest - 1) // 2 in (NEAR, FAR)


def test_ratios_are_of_ours_and_stand_beside_their_limits():
    """Ours takes a second for everything but a step at FAR, theirs two."""
    every = cases()
    of = {
        OURS: {case.name: 4.0 if case.manner == f"at {FAR}" else 1.0 for case in every},
        THEIRS: {case.name: 2.0 for case in every},
    }
    found = figures_of(every, {(side, name): [of[side]] * 3 for side in of for name in ALLOCATORS})
    ratios = [figure for figure in found if figure.table == "Ratios"]
    speed = [figure for figure in ratios if figure.metric == "ratio of tokens/s"]
    steps = [figure for figure in ratios if figure.metric == "ratio of ms per step"]
    assert {figure.values for figure in speed} == {(2.0, 2.0, 2.0)}
    assert len(speed) == len(ALLOCATORS) * 2 * len(FLOORS)
    assert {figure.values for figure in steps} == {(4.0, 4.0, 4.0)}
    assert len(steps) == len(ALLOCATORS) * 2

    def limits(metric: str) -> list[Figure]:
        return [figure for figure in ratios if figure.metric == metric]

    assert sorted(f.median for f in limits("at least")) == sorted([*FLOORS.values()] * 2)
    assert [f.median for f in limits("at most")] == [CEILING] * 2
    assert all("default allocator" in f.subject for f in (*limits("at least"), *limits("at most")))
