# SPDX-License-Identifier: Apache-2.0
"""The same responses at every layout: one rank is the oracle, 4 gloo ranks are cut in many ways."""

from pathlib import Path

import fork
import pytest
import torch
import worker
import writing_worker
from known_weights import randomize
from writing_worker import CASES, NAMES, Case

from nemo_aligner.checkpoint.sharded import save_model
from nemo_aligner.models.gpt.model import build_gpt
from nemo_aligner.parallel import world
from nemo_aligner.parallel.ranks import Layout

RANKS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank's responses and, from the same saved weights, what 4 ranks write."""
    out = tmp_path_factory.mktemp("generate")
    with world.ensure_single_process():
        for tied in (True, False):
            model = build_gpt(worker.config(tied=tied), Layout(), torch.float32)
            randomize(model)
            save_model(model, out / f"weights-tied-{tied}")
            policy = writing_worker.policy(Case(tied=tied), out)
            oracle = writing_worker.written(policy, writing_worker.prompts(), slots=16)
            torch.save(oracle, out / f"oracle-tied-{tied}.pt")
    fork.run_script(writing_worker.__file__, out, ranks=RANKS)
    return out


def load(path: Path) -> dict:
    return torch.load(path, weights_only=False)


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Nearly all alike; a token on the border of the kept, of which two roundings disagree, moves others a little."""
    apart = (found - expected).abs()
    return float(apart.max()) < 0.02 and float((apart < 1e-4).float().mean()) > 0.99


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_responses_are_one_ranks(folder: Path, case: Case, name: str):
    expected, _ = load(folder / f"oracle-tied-{case.tied}.pt")[name]
    for rank in range(RANKS):
        found = load(folder / f"{case}-rank{rank}.pt")
        rollout, trainers = found[name]
        first, every = found["dp"]
        mine, width = slice(first, None, every), rollout.seq_length
        assert torch.equal(rollout.tokens, expected.tokens[mine, :width])
        assert torch.equal(rollout.loss_mask, expected.loss_mask[mine, :width])
        for field in ("lengths", "prompt_lengths", "finished", "group"):
            assert torch.equal(getattr(rollout, field), getattr(expected, field)[mine])
        assert near(rollout.sampler_logprobs, expected.sampler_logprobs[mine, :width])
        if found["last"]:
            assert near(trainers, rollout.sampler_logprobs)
    assert name == "greedy" or 0 < int(expected.finished.sum()) < expected.num_rows


def test_a_rank_with_short_responses_ends_earlier(folder: Path):
    short, *long = (load(folder / f"time-{rank}.pt") for rank in range(RANKS))
    assert short["generate"] < min(rank["generate"] for rank in long) / 2
