# SPDX-License-Identifier: Apache-2.0
"""A base in four bits has the same values on two tensor parallel ranks as on one, and learns the same."""

from pathlib import Path

import fork
import nf4_worker
import pytest
import torch
from known_weights import randomize
from objective_cases import VOCAB

from nemo_aligner.checkpoint.sharded import save_model
from nemo_aligner.checkpoint.weights import WeightReader
from nemo_aligner.models.gpt.model import build_gpt
from nemo_aligner.parallel import world
from nemo_aligner.parallel.ranks import Layout


def test_two_ranks_are_one(tmp_path: Path):
    with world.ensure_single_process():
        model = build_gpt(nf4_worker.CONFIG, Layout(), torch.float32)
        randomize(model)
        save_model(model, tmp_path / "weights")
        oracle = nf4_worker.run(Layout(), tmp_path / "weights", tmp_path / "tp1")
    fork.run_script(nf4_worker.__file__, tmp_path, ranks=2)
    for ours, theirs in zip(torch.load(tmp_path / "curve.pt"), oracle, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for end, atol in (("-base", 0), ("", 1e-4)):
        one, two = (WeightReader(tmp_path / f"tp{size}{end}") for size in (1, 2))
        assert one.shapes.keys() == two.shapes.keys()
        for name in one.shapes:
            ours, theirs = two.read(name), one.read(name)
            if "embedding" in name or "output_layer" in name:
                ours, theirs = ours[:VOCAB], theirs[:VOCAB]  # padded by the number of ranks
            torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
