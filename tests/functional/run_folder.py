# SPDX-License-Identifier: Apache-2.0
"""What a run has left in its folder."""

from pathlib import Path

import torch

from nemo_aligner.checkpoint.torch_dist import FolderReader


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in the newest checkpoint's weights and optimizer."""
    found = {}
    for part in ("model_weights", "training_state"):
        reader = FolderReader(folder / "checkpoints/last" / part)
        for key, entry in reader.tensors.items():
            found[f"{part}/{key}"] = reader.read(key, (0,) * len(entry.size), tuple(entry.size))
    return found


def is_saving(folder: Path) -> bool:
    """Whether a second checkpoint is being written."""
    made = list((folder / "checkpoints").glob("*/trainer_state.json"))
    return bool(made) and any((folder / "checkpoints").glob(".saving-*step*/model_weights/*"))
