# SPDX-License-Identifier: Apache-2.0
"""Distributed checkpoints against megatron-core: it reads what we write at any sharding, we read what it
writes.
"""

import io
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from torch import Tensor
from torch.distributed import checkpoint as dcp

from nemo_aligner.checkpoint.torch_dist import FolderWriter, check_folder
from nemo_aligner.checkpoint.weights import WeightReader, save_weights
from nemo_aligner.errors import UserError

LAYERS, FFN, HIDDEN, VOCAB = 3, 12, 8, 50
FC1 = "decoder.layers.{i}.mlp.linear_fc1.weight"
FC1_KEY = "model.decoder.layers.mlp.linear_fc1.weight"
EMBEDDING = "embedding.word_embeddings.weight"


def make_weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {EMBEDDING: (VOCAB, HIDDEN), "decoder.final_layernorm.weight": (HIDDEN,)}
    shapes |= {FC1.format(i=i): (2 * FFN, HIDDEN) for i in range(LAYERS)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_weights(tmp_path / "model_weights", make_weights().items(), LAYERS, vocab_multiple=64)
    return tmp_path / "model_weights"


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """megatron-core wants one, even in one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gated_shards(tensors: list[Tensor | None], ranks: int) -> dict[str, ShardedTensor]:
    """fc1 of every layer as TransformerBlock shards it over ``ranks``: gate and up apart, each cut by
    rows.
    """
    rows = FFN // ranks
    pieces = {}
    for layer, tensor in enumerate(tensors):
        for rank in range(ranks):
            for half in range(2):
                begin = half * FFN + rank * rows
                data = torch.empty(rows, HIDDEN) if tensor is None else tensor[begin : begin + rows].clone()
                rows_axis = (1, half * ranks + rank, 2 * ranks)
                pieces[f"{layer}.{half}.{rank}"] = ShardedTensor.from_rank_offsets(
                    FC1_KEY, data, (0, layer, LAYERS), rows_axis, prepend_axis_num=1
                )
    return pieces


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path: Path, dtype: torch.dtype):
    weights = make_weights(dtype)
    save_weights(tmp_path / "w", iter(weights.items()), LAYERS, vocab_multiple=64)
    reader = WeightReader(tmp_path / "w")
    assert set(list(reader.shapes)) == set(weights)
    assert reader.dtype_of(EMBEDDING) == dtype
    for name, tensor in weights.items():
        stored = reader.read(name)
        assert reader.shapes[name] == tuple(stored.shape)
        assert torch.equal(stored[: len(tensor)], tensor)
    assert reader.shapes[EMBEDDING] == (64, HIDDEN)
    assert not reader.read(EMBEDDING)[VOCAB:].any()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_megatron_loads_it_at_any_tensor_parallel_size(folder: Path, ranks: int):
    weights = make_weights()
    wanted = dict(gated_shards([None] * LAYERS, ranks))
    # A vocabulary padded for more ranks than it was saved for, as VocabParallelEmbedding asks for it.
    wanted["vocabulary"] = ShardedTensor.from_rank_offsets(
        f"model.{EMBEDDING}", torch.empty(96, HIDDEN), allow_shape_mismatch=True
    )
    for module in ("self_attention.linear_qkv", "mlp.linear_fc1"):
        key = f"model.decoder.layers.{module}._extra_state"
        wanted |= {f"{module}.{i}": ShardedObject(key, None, (LAYERS,), (i,)) for i in range(LAYERS)}
    loaded = dist_checkpointing.load(wanted, str(folder))
    for layer in range(LAYERS):
        pieces = [loaded[f"{layer}.{half}.{rank}"] for half in range(2) for rank in range(ranks)]
        assert torch.equal(torch.cat(pieces), weights[FC1.format(i=layer)])
    assert torch.equal(loaded["vocabulary"][:VOCAB], weights[EMBEDDING])
    assert loaded["mlp.linear_fc1.1"] is None


@pytest.mark.usefixtures("process_group")
def test_what_megatron_wrote_at_tensor_parallel_2_is_read(tmp_path: Path):
    weights = make_weights()
    shards = gated_shards([weights[FC1.format(i=i)] for i in range(LAYERS)], ranks=2)
    whole = ShardedTensor.from_rank_offsets(f"model.{EMBEDDING}", weights[EMBEDDING])
    state = mcore_to_pyt_state_dict({FC1_KEY: list(shards.values()), whole.key: [whole]})
    dcp.save(state, checkpoint_id=tmp_path, planner=MCoreSavePlanner(flatten_state_dict=False))
    torch.save({"step": 3}, tmp_path / "common.pt")
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')

    check_folder(tmp_path)
    reader = WeightReader(tmp_path)
    for layer in range(LAYERS):
        assert torch.equal(reader.read(FC1.format(i=layer)), weights[FC1.format(i=layer)])
    assert torch.equal(reader.read(EMBEDDING), weights[EMBEDDING])


def test_an_incomplete_model_is_refused(tmp_path: Path):
    weights = make_weights()
    del weights[FC1.format(i=1)]
    with pytest.raises(UserError, match=r"missing in layers \[1\]"):
        save_weights(tmp_path, weights.items(), LAYERS)
    assert not (tmp_path / ".metadata").exists()


def test_layers_of_different_dtypes_are_refused(tmp_path: Path):
    weights = make_weights()
    weights[FC1.format(i=2)] = weights[FC1.format(i=2)].half()
    with pytest.raises(UserError, match=r"layers\.2.* is torch\.float16"):
        save_weights(tmp_path, weights.items(), LAYERS)


def test_a_hostile_metadata_file_runs_nothing(folder: Path, hostile: object, tmp_path: Path):
    (folder / ".metadata").write_bytes(pickle.dumps(hostile))
    with pytest.raises(UserError, match="could run code"):
        check_folder(folder)
    with pytest.raises(UserError, match="could run code"):
        WeightReader(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("reach", ["os.system", "torch.hub.load", "torch._C._cuda_init"])
def test_dotted_names_do_not_lead_out_of_the_allowed_classes(folder: Path, reach: str):
    """Protocol 4 follows attributes: ("torch", "Size.x.y") must not be looked up."""
    module, _, name = reach.partition(".")
    stack = (
        b"\x80\x04\x8c"
        + bytes([len(module)])
        + module.encode()
        + b"\x8c"
        + bytes([len(name)])
        + name.encode()
    )
    (folder / ".metadata").write_bytes(stack + b"\x93.")
    with pytest.raises(UserError, match="could run code"):
        WeightReader(folder)


@pytest.mark.parametrize("content", [b"", b"\x80", b"garbage", pickle.dumps({"a": 1}), pickle.dumps(None)])
def test_a_damaged_metadata_file_is_refused(folder: Path, content: bytes):
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        WeightReader(folder)


def test_a_hostile_common_file_runs_nothing(folder: Path, hostile: object, tmp_path: Path):
    torch.save({"x": hostile}, folder / "common.pt")
    with pytest.raises(UserError, match=r"common\.pt is damaged or holds more than tensors"):
        check_folder(folder)
    assert not (tmp_path / "ran").exists()


def test_a_hostile_object_entry_runs_nothing(tmp_path: Path, hostile: object):
    """megatron-core loads these without restriction."""
    with FolderWriter(tmp_path / "w") as writer:
        writer.add_object("model.x._extra_state/shard_0_1", [hostile])
    with pytest.raises(UserError, match="more than tensors"):
        check_folder(tmp_path / "w")
    with FolderWriter(tmp_path / "v") as writer:
        content = torch.frombuffer(bytearray(pickle.dumps(hostile)), dtype=torch.uint8)
        writer.add_object("model.x._extra_state/shard_0_1", [content])
    with pytest.raises(UserError, match="pickled FP8 state"):
        check_folder(tmp_path / "v")
    inner = io.BytesIO()
    torch.save(hostile, inner)
    with FolderWriter(tmp_path / "u") as writer:
        writer.add_object("model.x._extra_state/shard_0_1", [inner])
    with pytest.raises(UserError, match="more than tensors"):
        check_folder(tmp_path / "u")
    assert not (tmp_path / "ran").exists()


def test_what_transformer_engine_stores_without_fp8_passes(tmp_path: Path):
    empty = io.BytesIO()
    torch.save(None, empty)
    with FolderWriter(tmp_path) as writer:
        writer.add_object("a._extra_state/shard_0_1", [None, torch.empty(0, dtype=torch.uint8), empty])
    check_folder(tmp_path)


def test_a_cut_data_file_is_refused(folder: Path):
    data = next(folder.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(UserError, match="cut short"):
        check_folder(folder)
    data.unlink()
    with pytest.raises(UserError, match="not in the folder"):
        check_folder(folder)


def test_a_damaged_tensor_is_refused(folder: Path):
    data = next(folder.glob("*.distcp"))
    data.write_bytes(b"\0" * data.stat().st_size)
    with pytest.raises(UserError, match="damaged"):
        WeightReader(folder).read(EMBEDDING)


def test_another_backend_is_refused(folder: Path):
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(UserError, match="zarr"):
        WeightReader(folder)
