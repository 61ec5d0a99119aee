# SPDX-License-Identifier: Apache-2.0
"""Frozen weights in files: one for all that have the same, unharmed by a writer."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nemo_aligner.models.gpt.shared_weights import share_frozen


def model(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    layer = nn.Linear(256, 256).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(scale * torch.arange(256 * 256).view(256, 256) / 1000)
    layer.weight.requires_grad_(False)
    layer.register_buffer("codes", torch.arange(1 << 17, dtype=torch.int32).to(torch.uint8))
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_weights_lie_in_one_file(tmp_path: Path, dtype: torch.dtype):
    first, second, other = model(dtype=dtype), model(dtype=dtype), model(2.0, dtype)
    expected, size = first.weight.clone(), first.weight.numel() * first.weight.element_size()
    assert share_frozen(first, tmp_path) == (size + (1 << 17), 0)
    assert share_frozen(second, tmp_path) == (size + (1 << 17), size + (1 << 17))
    assert share_frozen(other, tmp_path) == (size + (1 << 17), 1 << 17)
    assert len(list(tmp_path.iterdir())) == 3
    for one in (first, second):
        assert torch.equal(one.weight, expected)
        assert torch.equal(one.codes, model().codes)
    assert torch.equal(other.weight, 2 * expected)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len(mapped) == 6, "weights are maps of the files"


def test_who_writes_has_a_copy(tmp_path: Path):
    first, second, third = model(), model(), model()
    share_frozen(first, tmp_path)
    share_frozen(second, tmp_path)
    with torch.no_grad():
        first.weight.zero_()
    share_frozen(third, tmp_path)
    assert torch.equal(second.weight, model().weight)
    assert torch.equal(third.weight, model().weight)


def test_what_is_trained_stays(tmp_path: Path):
    layer = model()
    layer.weight.requires_grad_()
    before = layer.weight.data_ptr()
    assert share_frozen(layer, tmp_path)[0] == 1 << 17
    assert layer.weight.data_ptr() == before


def test_writers_at_the_same_time_share_one_file(tmp_path: Path):
    models = [model() for _ in range(8)]
    with ThreadPoolExecutor(len(models)) as pool:
        shared = list(pool.map(lambda one: share_frozen(one, tmp_path), models))
    assert len(list(tmp_path.iterdir())) == 2, "no unfinished file is left"
    (total,) = {both[0] for both in shared}
    assert sum(found for _, found in shared) == 7 * total, "all but the first have found each file"
    inodes = {
        line.split()[4] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line
    }
    assert len(inodes) == 2


def test_a_folder_without_room_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=500_000))
    layer = model()
    assert share_frozen(layer, tmp_path) == (0, 0)
    assert list(tmp_path.iterdir()) == []
    assert "--shm-size" in caplog.text
