# SPDX-License-Identifier: Apache-2.0
"""Weights of a built model, to a folder and back."""

import errno
import itertools
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch
from torch import Tensor, nn

from nemo_aligner.checkpoint.sharded import load_model, load_state, save_model, save_state
from nemo_aligner.checkpoint.torch_dist import FolderWriter, check_folder
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.model import GPT, build_gpt
from nemo_aligner.parallel import world
from nemo_aligner.parallel.ranks import Layout
from nemo_aligner.parallel.shards import Shards, boxes

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


def test_plain_values_are_read_wherever_they_lie(tmp_path: Path):
    """In common.pt, as megatron-core 0.16 writes them, and among the tensors, as 0.19 does."""
    with FolderWriter(tmp_path / "old"):
        pass
    torch.save({"step": 3}, tmp_path / "old/common.pt")
    with FolderWriter(tmp_path / "new") as writer:
        writer.add_object("common_state/shard_0_1", [{"step": 4}])
    (tmp_path / "new/common.pt").unlink()
    with world.ensure_single_process():
        assert load_state({}, tmp_path / "old", remedy="-") == {"step": 3}
        assert load_state({}, tmp_path / "new", remedy="-") == {"step": 4}


def test_plain_values_that_are_none_are_refused(tmp_path: Path):
    with FolderWriter(tmp_path / "weights") as writer:
        writer.add_object("common_state/shard_0_1", [None])
    (tmp_path / "weights/common.pt").unlink()
    with pytest.raises(UserError, match="common_state/shard_0_1 holds list"):
        check_folder(tmp_path / "weights")


def test_plain_values_are_saved_as_they_were_when_the_save_began(tmp_path: Path):
    begins = Event()
    with world.ensure_single_process(), ThreadPoolExecutor(1) as executor:
        executor.submit(begins.wait)
        state = {"groups": [{"step": 1}], "weight": small_gpt(0.5).sharded_state_dict()}
        written = save_state(state, tmp_path / "state", executor=executor)
        state["groups"][0]["step"] = 2
        begins.set()
        assert written is not None
        written.result()
        assert load_state({}, tmp_path / "state", remedy="-")["groups"] == [{"step": 1}]


def test_a_disk_without_room_is_reported_with_its_folder(tmp_path: Path):
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


def cut(values: Tensor, *ends: int, may_differ: bool = False) -> Shards:
    """All of ``values`` in pieces of its memory, one part after another."""
    pieces = {}
    for start, stop in itertools.pairwise((0, *ends, values.numel())):
        for offsets, sizes in boxes(start, stop, values.shape):
            place = tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))
            pieces[torch.Size(offsets)] = values[place]
    return Shards(key="moments", shape=values.shape, pieces=pieces, may_differ=may_differ)


@pytest.mark.parametrize("in_background", [False, True])
def test_pieces_are_loaded_as_other_pieces(tmp_path: Path, *, in_background: bool):
    values, found = torch.rand(6, 5, dtype=torch.float64), torch.zeros(6, 5, dtype=torch.float64)
    with world.ensure_single_process(), ThreadPoolExecutor(1) as executor:
        written = save_state(
            {"step": 3, "inner": [cut(values, 7, 21)]},
            tmp_path / "state",
            executor=executor if in_background else None,
        )
        expected = values.clone()
        values.zero_()
        if written is not None:
            written.result(timeout=60)
        state = load_state({"step": 0, "inner": [cut(found, 2, 8, 29)]}, tmp_path / "state", remedy="")
    assert state["step"] == 3
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_replicas_are_loaded_and_not_saved(tmp_path: Path):
    values, replica = torch.rand(6, 5), torch.zeros(6, 5)
    other = replace(cut(torch.rand(6, 5), 4), is_replica=True)
    with world.ensure_single_process():
        save_state({"first": cut(values), "second": other}, tmp_path / "state")
        load_state({"second": replace(cut(replica, 9), is_replica=True)}, tmp_path / "state", remedy="")
    torch.testing.assert_close(replica, values, rtol=0, atol=0)


def test_another_shape_is_refused_unless_it_is_padding(tmp_path: Path):
    values, larger = torch.rand(4, 3), torch.zeros(6, 3)
    with world.ensure_single_process():
        save_state({"moments": cut(values, 5)}, tmp_path / "state")
        with pytest.raises(
            UserError, match=r"moments has shape \[4, 3\] there, \[6, 3\] here\nFix: be careful"
        ):
            load_state({"moments": cut(larger)}, tmp_path / "state", remedy="be careful")
        load_state({"moments": cut(larger, 8, may_differ=True)}, tmp_path / "state", remedy="")
        with pytest.raises(UserError, match="no variances"):
            load_state({"x": replace(cut(larger), key="variances")}, tmp_path / "state", remedy="")
    torch.testing.assert_close(larger, torch.cat([values, torch.zeros(2, 3)]), rtol=0, atol=0)
