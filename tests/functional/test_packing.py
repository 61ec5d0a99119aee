# SPDX-License-Identifier: Apache-2.0
"""Rows end to end are learned from as rows that are padded, at every layout, and take fewer tokens."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.functional.run_folder import metrics

TENSOR_AND_SEQUENCE = {
    "trainer.devices": 2,
    "model.tensor_model_parallel_size": 2,
    "model.sequence_parallel": True,
}
PIPELINE_AND_DATA = {"trainer.devices": 4, "model.pipeline_model_parallel_size": 2}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """30 rows of very different lengths, so that the last step of validation has padding rows."""
    path = tmp_path / "uneven.jsonl"
    lines = [{"input": f"thing {i}:", "output": "blue " * (1 + i * i % 13)} for i in range(30)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "layout", [{}, TENSOR_AND_SEQUENCE, PIPELINE_AND_DATA], ids=["one", "TP2 + SP", "PP2 x DP2"]
)
def test_packed_rows_are_learned_from_as_padded_ones(
    run: Callable, settings: dict[str, object], rows: Path, tmp_path: Path, layout: dict[str, object]
):
    few = {
        "model.data.train_ds.file_path": rows,
        "model.data.validation_ds.file_path": rows,
        "model.optim.lr": 1e-3,
        "model.optim.sched.warmup_steps": 0,
        "trainer.sft.max_steps": 3,
        "trainer.sft.val_check_interval": 3,
    }
    for name, changed in (("padded", {}), ("packed", {"model.data.packing": True, **layout})):
        job = run(settings | few | changed | {"exp_manager.explicit_log_dir": tmp_path / name})
        assert job.wait() == 0, job.err[-3000:]
    padded, packed = metrics(tmp_path / "padded"), metrics(tmp_path / "packed")
    assert len(packed) == len(padded) == 4
    for ours, theirs in zip(packed, padded, strict=True):
        timed = {name for name in ours if name == "time" or name.endswith(("_time", "tokens_per_s"))}
        for name in ours.keys() - timed:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name
