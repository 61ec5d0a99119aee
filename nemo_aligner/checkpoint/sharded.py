# SPDX-License-Identifier: Apache-2.0
"""State of all ranks to and from torch_dist folders: saved at one layout, loaded at any other."""

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_inplace,
    extract_matching_values,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    apply_factories,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.distributed import checkpoint as torch_dist_checkpoint  # noqa: TID251 - the file format; no collectives here
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner  # noqa: TID251 - as above
from torch.distributed.checkpoint.metadata import (  # noqa: TID251 - as above
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (  # noqa: TID251 - as above
    LoadPlan,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list  # noqa: TID251 - as above

from nemo_aligner.checkpoint.digests import Digests, digests_of
from nemo_aligner.checkpoint.finite import refuse_non_finite
from nemo_aligner.checkpoint.torch_dist import FolderReader, check_folder
from nemo_aligner.checkpoint.weights import NamedWeights, WeightReader
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.lora import ADAPTERS, is_adapted
from nemo_aligner.models.gpt.model import changed_weights
from nemo_aligner.parallel import collectives, cpu_shim, world
from nemo_aligner.parallel.shards import Shards
from nemo_aligner.run.disk import check_room

PREFIX = "model."
_MORE = 1 << 20  # bytes of small files and of the formats themselves


class _SaveInProcess(TorchDistSaveShardedStrategy):
    """Writes from this process: Megatron's own strategy starts processes that import torch again for each save.

    With an executor what is to be written is copied, and written while training goes on.
    """

    def __init__(self, shards: Sequence[Shards], executor: Executor | None) -> None:
        super().__init__("torch_dist", 1)
        self._shards, self._executor = shards, executor
        self.written: Future[Digests] = Future()

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        shards = [one for one in self._shards if not one.is_replica]
        if self._executor is not None:
            dict_list_map_inplace(_copied, sharded_state_dict)
            shards = [one.copied() for one in shards]
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        tensors = mcore_to_pyt_state_dict(state, False) | {one.key: _Pieces(one) for one in shards}
        writer = _WriterAtOwnPace if self._executor is None else torch_dist_checkpoint.FileSystemWriter
        # Of its own, so that a thread's collectives do not cross those of training.
        group = world.writers_group() if self._executor else None

        def write() -> Digests:
            with _first_failure(checkpoint_dir):
                torch_dist_checkpoint.save(
                    tensors,
                    storage_writer=writer(checkpoint_dir, thread_count=1),
                    planner=_SavePlanner(
                        dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
                    ),
                    process_group=group,
                )
            own = Path(checkpoint_dir).glob(f"__{world.rank()}_*")
            return digests_of(Path(checkpoint_dir), sorted(path.name for path in own))

        if self._executor is None:
            self.written.set_result(write())
        else:
            self.written = self._executor.submit(write)


class _WriterAtOwnPace(torch_dist_checkpoint.FileSystemWriter):
    """Ranks whose disk is slower than others' are waited for."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:  # noqa: ANN401 - torch's Future
        failure: Exception | None = None
        written = None
        with world.at_own_pace():
            try:
                written = super().write_data(plan, planner)
            except Exception as error:  # torch reports it to all ranks
                failure = error
        if failure is not None:
            raise failure
        return written


class _Pieces:
    """The interface that torch needs to save a tensor in pieces."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def __create_write_items__(self, key: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(key, place),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(place, piece),
                    properties=TensorProperties.create_from_tensor(piece),
                    size=self.shards.shape,
                ),
            )
            for place, piece in self.shards.pieces.items()
        ]


def _chunk(place: torch.Size, piece: Tensor) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=place, sizes=piece.size())


class _SavePlanner(MCoreSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:  # noqa: ANN401 - a tensor, or bytes
        found = self.state_dict[index.fqn]
        if isinstance(found, _Pieces):
            assert index.offset is not None
            return found.shards.pieces[index.offset]
        return super().lookup_object(index)


class _LoadPlanner(DefaultLoadPlanner):
    """Reads into the pieces of a dict of :class:`Shards`, whatever pieces were saved."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for key, shards in self.state_dict.items():
            stored = self.metadata.state_dict_metadata.get(key)
            if not isinstance(stored, TensorStorageMetadata):
                raise KeyError(f"no {key}")
            if stored.size != shards.shape and not shards.may_differ:
                raise CheckpointingException(
                    f"{key} has shape {list(stored.size)} there, {list(shards.shape)} here"
                )
            wanted = [_chunk(place, piece) for place, piece in shards.pieces.items()]
            items += create_read_items_for_chunk_list(key, stored, wanted)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].pieces[index.offset]


@contextmanager
def _first_failure(folder: str | Path) -> Iterator[None]:
    """Raise what a rank raised; torch wraps it, Ctrl-C too, in an exception that ``except Exception`` lets pass."""
    try:
        yield
    except torch_dist_checkpoint.CheckpointException as error:
        failure, _ = next(iter(error.failures.values()))
        if isinstance(failure, OSError) and failure.filename is None:
            failure.filename = str(folder)  # which write() does not name
        raise failure from error


def _split(state: dict[str, Any]) -> tuple[list[Shards], Any]:
    """The Shards, and what Megatron knows how to store."""
    shards, others = extract_matching_values(state, lambda value: isinstance(value, Shards))
    return list(nested_values(shards)), others


def _copied(value: object) -> object:
    if isinstance(value, ShardedObject):
        return replace(value, data=copy.deepcopy(value.data))
    if isinstance(value, ShardedTensor) and value.data is not None:
        return replace(value, data=value.data.detach().to("cpu", copy=True))
    return value


class _CommonAmongTensors:
    """Has megatron-core 0.16 read plain values that 0.19 has saved."""

    can_handle_sharded_objects = True

    def load_common(self, folder: str) -> dict[str, Any]:
        return FolderReader(Path(folder)).common()

    def check_backend_compatibility(self, _: str) -> None: ...

    def check_version_compatibility(self, _: int) -> None: ...


def _common_strategy(folder: Path) -> dict[str, Any]:
    if cpu_shim.series() != cpu_shim.SERIES[0] or FolderReader(folder).has_common_file:
        return {}
    return {"common_strategy": _CommonAmongTensors()}


def stored_bytes(state: ShardedStateDict) -> int:
    """Bytes that this rank writes of ``state``; what all ranks hold alike, one of them writes."""
    found = 0
    for value in nested_values(state):
        if isinstance(value, Shards) and not value.is_replica:
            found += sum(piece.nbytes for piece in value.pieces.values())
        elif (
            isinstance(value, ShardedTensor) and value.data is not None and is_main_replica(value.replica_id)
        ):
            found += value.data.nbytes
    return found


def check_room_for_all(folder: Path, own: int, what: str, *, spare: int = 0) -> int:
    """Raise UserError on every rank if the disk of ``folder`` has no room for ``what``; else return its bytes.

    Args:
        own: bytes that this rank writes.
        spare: bytes that rank 0 needs beside them for a while.

    Raises:
        UserError: on every rank.
    """
    needed = sum(collectives.of_all_ranks(own)) + spare + _MORE
    collectives.from_rank_0(lambda: check_room(folder, needed, what))
    return needed


def save_state(state: ShardedStateDict, folder: Path, *, executor: Executor | None = None) -> Future[Digests]:
    """Write ``state`` of all ranks into ``folder``, which rank 0 makes. Called by every rank.

    Args:
        state: Megatron's sharded tensors, :class:`Shards`, and plain values that are the same on every rank.
        executor: one thread that writes in the background; the future then has this rank's result.

    Returns:
        The digests of the files that this rank alone has written.
    """
    if world.is_logging_rank():
        folder.mkdir(parents=True, exist_ok=False)
    world.barrier()
    cpu_shim.install()
    shards, others = _split(state)
    strategy = _SaveInProcess(shards, executor)
    with world.phase(f"saving {folder}"):
        dist_checkpointing.save(others, str(folder), sharded_strategy=strategy)
    return strategy.written


def load_state(state: ShardedStateDict, folder: Path, *, remedy: str) -> dict[str, Any]:
    """The values of ``state`` from ``folder``, whatever layout they were saved at. Called by every rank.

    :class:`Shards` are filled in place, and not among the values that are returned.

    Args:
        remedy: the fix where they do not fit.

    Raises:
        UserError: a tensor is missing, has another shape, or the folder could run code.
    """
    check_folder(folder)
    cpu_shim.install()
    shards, others = _split(state)
    pieces = {one.key: one for one in shards}
    with world.phase(f"loading {folder}"):
        try:
            with _first_failure(folder), torch.no_grad():
                loaded: Any = dist_checkpointing.load(others, str(folder), **_common_strategy(folder))
                if pieces:
                    torch_dist_checkpoint.load(pieces, checkpoint_id=folder, planner=_LoadPlanner())
        except (CheckpointingException, KeyError, RuntimeError) as error:
            if world.describe_failure(error):
                raise
            raise UserError(
                f"what is stored in {folder} does not fit the model: {str(error).splitlines()[0]}", fix=remedy
            ) from error
    return loaded


def save_model(model: MegatronModule, folder: Path) -> Future[Digests]:
    """Write the weights of all ranks, adapters merged; see :func:`save_state`."""
    return save_state(whole_state(model), folder)


def model_state(model: MegatronModule) -> ShardedStateDict:
    """The weights that are trained: all of them, or adapters and a head."""
    state = model.sharded_state_dict(prefix=PREFIX)
    if not is_adapted(model):
        return state
    trained = {f"{PREFIX}{name}" for name, weight in model.named_parameters() if weight.requires_grad}
    return {name: value for name, value in state.items() if name in trained}


def whole_state(model: MegatronModule) -> ShardedStateDict:
    """All weights, adapters merged into those that they are added to, which are copied to CPU memory."""
    state = model.sharded_state_dict(prefix=PREFIX)
    for name, weight in changed_weights(model):
        key = f"{PREFIX}{name}.weight"
        state[key] = replace(state[key], data=weight.cpu())
    return {key: value for key, value in state.items() if ADAPTERS not in key.split(".")}


def load_model(model: MegatronModule, weights: Path | NamedWeights, *, but: str | None = None) -> None:
    """Fill what is trained of ``model``, whatever layout it was saved at: each tensor in place, with its block.

    Called by every rank.

    Args:
        weights: the folder of a distributed checkpoint, or weights of another form.
        but: the name of a module that keeps the weights it has.

    Raises:
        UserError: on every rank; a tensor is missing, damaged, of another shape, or holds a number that is not finite.
    """
    where = weights if isinstance(weights, Path) else weights.where
    failure: UserError | None = None
    with world.phase(f"loading {where}"), world.at_own_pace(), torch.no_grad():
        wanted = {
            name: value
            for name, value in model_state(model).items()
            # Transformer Engine's FP8 state, of which there is none; what was saved without it lacks the entries.
            if not name.endswith("_extra_state") and (but is None or f".{but}." not in name)
        }
        apply_factories(wanted)
        try:
            source = WeightReader(weights) if isinstance(weights, Path) else weights
            for tensor in nested_values(wanted):
                _read_block(source, tensor)
        except UserError as error:
            failure = error
    for error in collectives.of_all_ranks(failure):
        if error is not None:
            raise error
    refuse_non_finite(
        model,
        problem=f"the weights in {where} are broken",
        fix="take an earlier checkpoint of the run that wrote them, or download the model again",
        but=but,
    )


def _read_block(source: NamedWeights, tensor: ShardedTensor) -> None:
    assert tensor.data is not None
    stacked = tensor.prepend_axis_num  # 1 where layers are
    start, shape = tensor.global_offset[stacked:], tensor.global_shape[stacked:]

    def name(layer: int) -> str:
        return tensor.key.removeprefix(PREFIX).replace(
            "layers.", f"layers.{layer}." if stacked else "layers.", 1
        )

    found = source.shapes.get(name(tensor.global_offset[0]), ())
    fits = found[1:] == shape[1:] if tensor.allow_shape_mismatch else found == shape
    if not (found and fits) or (stacked and name(tensor.global_shape[0]) in source.shapes):
        raise UserError(
            f"what is stored in {source.where} does not fit the model: {tensor.key} has shape "
            f"{list(tensor.global_shape)} here, and there {f'a layer has {list(found)}' if found else 'is none'}",
            fix="use the model_config.yaml that was saved with these weights, without architecture overrides",
        )
    # What follows the vocabulary are rows of zeros.
    rows = min(max(found[0] - start[0], 0), tensor.data.shape[0])
    tensor.data[rows:] = 0
    if rows:
        tensor.data[:rows] = source.read(name(tensor.global_offset[0]), start, (rows, *tensor.data.shape[1:]))
