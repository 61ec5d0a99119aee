# SPDX-License-Identifier: Apache-2.0
"""A model's weights between its ranks and a torch_dist folder: saved at one TP x PP, loaded at any other."""

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.transformer.module import MegatronModule
from torch.distributed import checkpoint as torch_dist_checkpoint  # noqa: TID251 - the file format; no collectives here

from nemo_aligner.checkpoint.torch_dist import check_folder
from nemo_aligner.errors import UserError
from nemo_aligner.parallel import cpu_shim, world

__all__ = ["load_model", "save_model"]

PREFIX = "model."


class _SaveInProcess(TorchDistSaveShardedStrategy):
    """Writes from this process: Megatron's own strategy starts processes that import torch again for each save."""

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        torch_dist_checkpoint.save(
            mcore_to_pyt_state_dict(state, False),
            storage_writer=torch_dist_checkpoint.FileSystemWriter(checkpoint_dir, thread_count=1),
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
            ),
        )


def save_model(model: MegatronModule, folder: Path) -> None:
    """Write the weights of all ranks into ``folder``, which rank 0 makes. Called by every rank."""
    if world.is_logging_rank():
        folder.mkdir(parents=True, exist_ok=False)
    world.barrier()
    cpu_shim.install()
    with world.phase(f"saving weights to {folder}"):
        dist_checkpointing.save(
            model.sharded_state_dict(prefix=PREFIX),
            str(folder),
            sharded_strategy=_SaveInProcess("torch_dist", 1),
        )


def load_model(model: MegatronModule, folder: Path) -> None:
    """Fill ``model`` on every rank from ``folder``, whatever layout it was saved at.

    Raises:
        UserError: a tensor is missing, has another shape, or the folder could run code.
    """
    check_folder(folder)
    cpu_shim.install()
    with world.phase(f"loading weights from {folder}"):
        try:
            state: Any = dist_checkpointing.load(model.sharded_state_dict(prefix=PREFIX), str(folder))
        except (CheckpointingException, KeyError, RuntimeError) as error:
            if world.describe_failure(error):
                raise
            raise UserError(
                f"the weights in {folder} do not fit the model that model_config.yaml beside it describes: "
                f"{str(error).splitlines()[0]}",
                cure="use the model_config.yaml that was saved with these weights, without architecture overrides",
            ) from error
    # Megatron neither saves nor asks for the FP8 state of Transformer Engine's attention, which a strict load misses.
    lacks = model.load_state_dict(
        {name.removeprefix(PREFIX): value for name, value in state.items()}, strict=False
    )
    assert not lacks.unexpected_keys, lacks.unexpected_keys
    assert all(name.endswith("_extra_state") for name in lacks.missing_keys), lacks.missing_keys
