# SPDX-License-Identifier: Apache-2.0
"""Weights of a built model, to a folder and back."""

import errno
import os
import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nemo_aligner.checkpoint.sharded import load_model, save_model
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.model import GPT, build_gpt
from nemo_aligner.parallel import world
from nemo_aligner.parallel.ranks import Layout

SIZES = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 100}


class FusedAttention(nn.Module):
    """What Megatron's wrapper of Transformer Engine's attention is to a checkpoint: a state that is not saved."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        raise AssertionError(f"nothing was saved, yet {state} is loaded")

    def sharded_state_dict(self, **_: object) -> dict[str, Tensor]:
        return {}


def small_gpt(fill: float) -> GPT:
    model = build_gpt(GPTConfig.from_dict(SIZES), Layout(), torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(fill)
    return model


def test_an_attention_with_a_state_of_its_own_loads(tmp_path: Path):
    with world.ensure_single_process():
        save_model(small_gpt(0.5), tmp_path / "weights")
        loaded = small_gpt(0.0)
        for layer in loaded.decoder.layers:
            layer.self_attention.core_attention.fused = FusedAttention()
        load_model(loaded, tmp_path / "weights")
    assert all(bool((parameter == 0.5).all()) for parameter in loaded.parameters())


def test_a_disk_without_room_is_told_with_its_folder(tmp_path: Path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with world.ensure_single_process():
        model = small_gpt(0.5)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
        try:
            with pytest.raises(OSError, match=str(tmp_path / "weights")) as told:
                save_model(model, tmp_path / "weights")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert told.value.errno == errno.EFBIG


def test_weights_that_were_cut_short_are_refused(tmp_path: Path):
    folder = tmp_path / "weights"
    with world.ensure_single_process():
        save_model(small_gpt(0.5), folder)
        (file,) = folder.glob("*.distcp")
        os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(UserError, match=str(folder)):
            load_model(small_gpt(0.0), folder)
