# SPDX-License-Identifier: Apache-2.0
"""Places in a job, read from a starter's environment; and worlds that do not fit."""

import subprocess
import sys
from dataclasses import replace

import pytest

from nemo_aligner.errors import UserError
from nemo_aligner.parallel.ranks import Layout, Ranks, discover

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "node[03-04]",
}


def test_nobody_has_made_ranks():
    assert discover({}) is None
    # A shell inside an allocation, and a batch script: ranks are still to be started.
    assert discover({k: SRUN[k] for k in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID")}) is None
    assert discover({"RANK": "0", "WORLD_SIZE": "1"}) is None
    # The shell of salloc, where Slurm runs it as its interactive step.
    assert discover(SRUN | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_torchrun():
    expected = Ranks(rank=5, world_size=16, local_rank=1, init_method="env://", starter="torchrun")
    assert discover(TORCHRUN) == expected
    assert discover(TORCHRUN | {"LOCAL_WORLD_SIZE": "4"}) == replace(expected, local_size=4)
    # torchrun inside a Slurm step: the inner starter made the ranks.
    assert discover(SRUN | TORCHRUN) == expected


def test_our_own_starter_comes_first():
    own = {
        "NEMO_ALIGNER_INIT_METHOD": "file:///tmp/meet",
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
    } | {"LOCAL_WORLD_SIZE": "2"}
    assert discover(TORCHRUN | own) == Ranks(
        rank=1, world_size=2, local_rank=1, local_size=2, init_method="file:///tmp/meet", starter="local"
    )


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("login1", "login1"),
        ("gpu-a,gpu-b", "gpu-a"),
        ("node[03-05]", "node03"),
        ("node[007,009-011]", "node007"),
        ("rack-2-node[9]", "rack-2-node9"),
        ("a1,node[03-05]", "a1"),
        ("node[03-05,9],login1", "node03"),
        ("r[1-2]n[03-04],r3n[5]", "r1n03"),
        ("node[4-5]-ib", "node4-ib"),
    ],
)
def test_srun_meets_at_the_first_node(nodes: str, first: str):
    found = discover(SRUN | {"SLURM_STEP_NODELIST": nodes})
    assert found is not None
    assert (found.rank, found.world_size, found.local_rank, found.starter) == (9, 16, 1, "srun")
    host, _, port = found.init_method.removeprefix("tcp://").rpartition(":")
    assert host == first
    assert 20000 <= int(port) < 32000


def test_srun_ports_are_one_for_a_step_and_apart_for_others():
    def port(job: int, step: int, proc: int) -> str:
        env = SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step), "SLURM_PROCID": str(proc)}
        found = discover(env)
        assert found is not None
        return found.init_method

    assert port(7, 0, 0) == port(7, 0, 15)
    assert len({port(job, step, 0) for job in (7, 8, 9) for step in (0, 1)}) == 6


def test_groups_of_a_heterogeneous_job_meet_apart():
    # What Slurm 22.05 gives the tasks of both steps, on one node.
    both = SRUN | {
        "SLURM_JOB_ID": "7",
        "SLURM_HET_SIZE": "2",
        "SLURM_JOB_NODELIST_HET_GROUP_0": "n1",
        "SLURM_JOB_NODELIST_HET_GROUP_1": "n1",
        "SLURM_NTASKS_HET_GROUP_0": "2",
        "SLURM_NTASKS_HET_GROUP_1": "4",
        "SLURM_STEP_NODELIST": "n1",
    }
    critic = discover(both | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"})
    actor = discover(both | {"SLURM_STEP_ID": "1", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"})
    assert critic is not None
    assert actor is not None
    assert (critic.world_size, actor.world_size) == (2, 4)
    assert critic.init_method != actor.init_method


def test_srun_with_a_chosen_address():
    found = discover(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4242"})
    assert found is not None
    assert found.init_method == "tcp://10.0.0.1:4242"


@pytest.mark.parametrize(
    ("layout", "nodes", "devices"),
    [
        (Layout(), 1, 1),
        (Layout(tensor=2, pipeline=2), 1, 4),
        (Layout(tensor=8, pipeline=2, context=2), 8, 8),
        (Layout(tensor=2, sequence_parallel=True), 3, 2),
    ],
)
def test_worlds_that_fit(layout: Layout, nodes: int, devices: int):
    layout.check_fits(num_nodes=nodes, devices=devices)
    layout.check_fits(num_nodes=nodes, devices=devices, world_size=nodes * devices)
    assert layout.data_parallel_size(nodes * devices) * layout.model_size == nodes * devices


@pytest.mark.parametrize(
    ("layout", "asked", "numbers", "fix"),
    [
        (
            Layout(tensor=2, pipeline=2),
            {"num_nodes": 1, "devices": 6},
            ["6 ranks", "tensor_model_parallel_size=2", "pipeline_model_parallel_size=2", "= 4 ranks"],
            "trainer.num_nodes=1 trainer.devices=8",
        ),
        (
            Layout(tensor=4),
            {"num_nodes": 2, "devices": 3},
            ["6 ranks", "trainer.num_nodes=2 x trainer.devices=3", "= 4 ranks"],
            "trainer.num_nodes=2 trainer.devices=4",
        ),
        (
            Layout(context=2),
            {"num_nodes": 1, "devices": 1},
            ["context_parallel_size=2 = 2 ranks"],
            "trainer.num_nodes=1 trainer.devices=2",
        ),
        (
            Layout(),
            {"num_nodes": 2, "devices": 8, "world_size": 8},
            ["made 8 ranks", "trainer.num_nodes=2 x trainer.devices=8 = 16"],
            "trainer.num_nodes=2 trainer.devices=4",
        ),
        (
            Layout(),
            {"num_nodes": 2, "devices": 2, "world_size": 3},
            ["made 3 ranks"],
            "trainer.num_nodes=1 trainer.devices=3",
        ),
        (Layout(), {"num_nodes": 1, "devices": 0}, ["trainer.devices=0"], "1 or more"),
        (
            Layout(virtual_pipeline=2),
            {"num_nodes": 1, "devices": 2},
            ["model.virtual_pipeline_model_parallel_size=2", "pipeline_model_parallel_size=1"],
            "model.virtual_pipeline_model_parallel_size=null",
        ),
        (
            Layout(sequence_parallel=True),
            {"num_nodes": 1, "devices": 2},
            ["model.sequence_parallel=True", "tensor_model_parallel_size=1"],
            "model.sequence_parallel=False",
        ),
    ],
)
def test_worlds_that_do_not_fit_are_refused(
    layout: Layout, asked: dict[str, int], numbers: list[str], fix: str
):
    with pytest.raises(UserError) as raised:
        layout.check_fits(**asked)
    for number in numbers:
        assert number in raised.value.problem
    assert fix in raised.value.fix


def test_the_fix_of_a_world_fits():
    for devices in range(1, 20):
        layout = Layout(tensor=2, pipeline=3)
        try:
            layout.check_fits(num_nodes=1, devices=devices)
        except UserError as error:
            words = dict(word.split("=") for word in error.fix.split() if word.startswith("trainer."))
            layout.check_fits(
                num_nodes=int(words["trainer.num_nodes"]), devices=int(words["trainer.devices"])
            )
        else:
            assert devices % 6 == 0


@pytest.mark.parametrize("module", ["parallel.ranks", "launch.script", "config"])
def test_it_imports_neither_torch_nor_megatron(module: str):
    """A script asks for its place, and has its settings checked, before it imports anything slow."""
    code = (
        f"import sys, nemo_aligner.{module}; "
        "sys.exit(any(m.split('.')[0] in ('torch', 'megatron') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("tasks", "size"), [("4(x2)", 4), ("8", 8), ("4,3", 4)])
def test_ranks_of_a_slurm_node(tasks: str, size: int):
    ranks = discover(SRUN | {"SLURM_STEP_TASKS_PER_NODE": tasks})
    assert ranks is not None
    assert ranks.local_size == size
