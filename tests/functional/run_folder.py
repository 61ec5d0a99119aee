# SPDX-License-Identifier: Apache-2.0
"""What a run has left in its folder."""

import json
from pathlib import Path

import torch

from nemo_aligner.checkpoint.torch_dist import FolderReader

TIMINGS = ("time", "train/step_time", "train/tokens_per_s", "validation/step_time")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in the newest checkpoint's weights and optimizer."""
    found = {}
    for part in ("model_weights", "training_state"):
        reader = FolderReader(folder / "checkpoints/last" / part)
        for key, entry in reader.tensors.items():
            found[f"{part}/{key}"] = reader.read(key, (0,) * len(entry.size), tuple(entry.size))
    return found


def metrics(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without its timing fields."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            name: value
            for name, value in line.items()
            if name not in TIMINGS and not name.startswith("timers/")
        }
        for line in lines
    ]


def metrics_by_step(folder: Path) -> dict[float, list[tuple[str, float]]]:
    """Every metric of each step, whichever of its lines holds it, as often as it is there."""
    found: dict[float, list[tuple[str, float]]] = {}
    for line in metrics(folder):
        step = line.pop("step")
        found.setdefault(step, []).extend(line.items())
    return {step: sorted(values) for step, values in found.items()}


def assert_same_learning(found: Path, wanted: Path) -> None:
    """The same weights, optimizer and metrics, bit for bit."""
    assert_same_tensors(found, wanted)
    assert metrics(found) == metrics(wanted)


def assert_same_tensors(found: Path, wanted: Path) -> None:
    """The same weights and optimizer, bit for bit."""
    ours, theirs = tensors(found), tensors(wanted)
    assert ours.keys() == theirs.keys()
    assert any("exp_avg_sq" in key for key in ours)
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def is_saving(folder: Path) -> bool:
    """Whether a second checkpoint is being written."""
    made = list((folder / "checkpoints").glob("*/trainer_state.json"))
    return bool(made) and any((folder / "checkpoints").glob(".saving-*step*/model_weights/*"))
