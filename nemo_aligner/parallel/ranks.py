# SPDX-License-Identifier: Apache-2.0
"""Which rank is this process, as its starter's environment says. Imports neither torch nor Megatron.

Knows torchrun, srun and our own starter (``launch/local.py``); knows nothing of models.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from nemo_aligner.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """One process's place in the job."""

    rank: int
    world_size: int
    local_rank: int  # among the ranks of this node
    local_size: int = 1  # ranks of this node, as far as the starter says
    init_method: str  # where the ranks meet, as torch's init_process_group takes it
    starter: str  # "torchrun", "srun", "local" or "single"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a world is cut: tensor (TP), pipeline (PP), context (CP) parallel sizes; the rest is data parallel."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1  # chunks of layers on each pipeline rank; above 1 the pipeline is interleaved
    context: int = 1
    sequence_parallel: bool = False

    @property
    def model_size(self) -> int:
        """Ranks of one model."""
        return self.tensor * self.pipeline * self.context

    def check_fits(self, *, num_nodes: int, devices: int, world_size: int | None = None) -> None:
        """Raise UserError for a world that cannot be split this way.

        Args:
            world_size: ranks that an outer starter (torchrun, srun) has already made; None where we start them.

        Raises:
            UserError: with the numbers and a setting that would fit.
        """
        asked = num_nodes * devices
        if num_nodes < 1 or devices < 1:
            raise UserError(
                f"trainer.num_nodes={num_nodes} and trainer.devices={devices} make no world of ranks",
                fix="set both to 1 or more",
            )
        for name in ("tensor", "pipeline", "virtual_pipeline"):
            if (size := getattr(self, name)) < 1:
                raise UserError(
                    f"model.{name}_model_parallel_size={size} is not 1 or more",
                    fix=f"set model.{name}_model_parallel_size=1",
                )
        if world_size is not None and world_size != asked:
            raise UserError(
                f"the starter made {world_size} rank{'s' * (world_size > 1)}, but trainer.num_nodes={num_nodes} x "
                f"trainer.devices={devices} = {asked}",
                fix=f"have the starter make {asked} (srun --ntasks={asked}, torchrun --nproc-per-node={devices}), or "
                + _nodes_and_devices(world_size, num_nodes)
                + (
                    "; in a shell that srun has made, env -u SLURM_PROCID before python has the script start its ranks"
                    if world_size == 1
                    else ""
                ),
            )
        if asked % self.model_size:
            fit = -(-asked // self.model_size) * self.model_size
            raise UserError(
                f"{asked} ranks (trainer.num_nodes={num_nodes} x trainer.devices={devices}) do not divide into models "
                f"of model.tensor_model_parallel_size={self.tensor} x model.pipeline_model_parallel_size="
                f"{self.pipeline} x model.context_parallel_size={self.context} = {self.model_size} ranks",
                fix=_nodes_and_devices(fit, num_nodes) + f" ({fit} ranks), or make the model's sizes smaller",
            )
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise UserError(
                f"model.virtual_pipeline_model_parallel_size={self.virtual_pipeline} interleaves a pipeline, but "
                "model.pipeline_model_parallel_size=1",
                fix="set model.virtual_pipeline_model_parallel_size=null, or "
                "model.pipeline_model_parallel_size to 2 or more",
            )
        if self.sequence_parallel and self.tensor == 1:
            raise UserError(
                "model.sequence_parallel=True needs tensor parallelism, but model.tensor_model_parallel_size=1",
                fix="set model.sequence_parallel=False, or model.tensor_model_parallel_size to 2 or more",
            )

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model in a world of ``world_size`` ranks."""
        return world_size // self.model_size


def _nodes_and_devices(world_size: int, num_nodes: int) -> str:
    nodes = num_nodes if world_size % num_nodes == 0 else 1
    return f"set trainer.num_nodes={nodes} trainer.devices={world_size // nodes}"


def discover(env: Mapping[str, str] = os.environ) -> Ranks | None:
    """This process's rank where a starter has made ranks; None where nobody has."""
    if "NEMO_ALIGNER_INIT_METHOD" in env:
        return Ranks(
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            local_rank=int(env["LOCAL_RANK"]),
            local_size=int(env["LOCAL_WORLD_SIZE"]),
            init_method=env["NEMO_ALIGNER_INIT_METHOD"],
            starter="local",
        )
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        return Ranks(
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            local_rank=int(env.get("LOCAL_RANK", "0")),
            local_size=int(env.get("LOCAL_WORLD_SIZE", "1")),
            init_method="env://",
            starter="torchrun",
        )
    # A shell inside an allocation has SLURM_* too, but no step or one of Slurm's own: there, we start the ranks.
    if "SLURM_PROCID" in env and env.get("SLURM_STEP_NODELIST") and _is_srun_step(env.get("SLURM_STEP_ID")):
        return None if _is_shell(env) else _slurm(env)
    return None


def speaks(ranks: Ranks | None) -> bool:
    """True for the one process of a job that reports a mistake to people."""
    return ranks is None or ranks.rank == 0


def _is_shell(env: Mapping[str, str]) -> bool:
    """True if the step is a terminal of one task, as ``srun --pty bash`` makes: there, we start the ranks."""
    return "SLURM_PTY_PORT" in env and env.get("SLURM_STEP_NUM_TASKS") == "1"


def _is_srun_step(step: str | None) -> bool:
    """Slurm numbers its own steps (batch script, interactive shell, extern) downwards from 2^32 - 1."""
    return step is not None and int(step) < 0xFFFFFFF0


def _slurm(env: Mapping[str, str]) -> Ranks:
    host = env.get("MASTER_ADDR") or _first_host(env["SLURM_STEP_NODELIST"])
    # All tasks of a step derive the same port; jobs that share a node get different ones. So do the groups of a
    # heterogeneous job: SLURM_JOB_ID is the leader's in each, and SLURM_STEP_ID counts over all of them. Below 32768,
    # where Linux begins to hand out ports by itself.
    port = env.get("MASTER_PORT") or str(
        20000 + (int(env["SLURM_JOB_ID"]) * 7 + int(env["SLURM_STEP_ID"])) % 12000
    )
    return Ranks(
        rank=int(env["SLURM_PROCID"]),
        world_size=int(env["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(env["SLURM_LOCALID"]),
        # Such as 4(x2),3: nodes of one job have equally many.
        local_size=int(re.split(r"\D", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0]),
        init_method=f"tcp://{host}:{port}",
        starter="srun",
    )


def _first_host(nodelist: str) -> str:
    """The first host of a Slurm node list such as ``node[03-05,9]-ib,login1``.

    Read here and not by scontrol, which containers rarely have.
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    assert first is not None, nodelist
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])
