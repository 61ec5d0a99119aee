# SPDX-License-Identifier: Apache-2.0
"""The CPU shim's table against the megatron-core that is installed, and what it leaves alone."""

import importlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from nemo_aligner.parallel import cpu_shim

VERSIONS = {"0.16": "0.16.1", "0.19": "0.19.2"}


def test_the_table_is_read_against_these_versions():
    """Another megatron-core: go through the table, then change both."""
    assert tuple(VERSIONS) == cpu_shim.SERIES
    assert version("megatron-core") == VERSIONS[cpu_shim.series()]
    assert "megatron-core {} and {};".format(*VERSIONS.values()) in cpu_shim.__doc__


@pytest.mark.parametrize(
    ("module", "name"), [row[:2] for row in cpu_shim.SYMBOLS if cpu_shim.series() in row[3]]
)
def test_replaced_functions_are_there(module: str, name: str):
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize(("module", "names", "series"), [row[:3] for row in cpu_shim.MODULES])
def test_emptied_modules_are_there(module: str, names: tuple[str, ...], series: tuple[str, ...]):
    """Read, not imported: without triton they are empty here."""
    package, _, stem = module.rpartition(".")
    if cpu_shim.series() not in series:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(package)
        return
    [folder] = importlib.import_module(package).__path__
    text = (Path(folder) / f"{stem}.py").read_text()
    assert "import triton" in text
    assert all(name in text for name in names)


@pytest.mark.parametrize("name", [row[0] for row in cpu_shim.CUDA])
def test_replaced_names_are_torch_cudas(name: str):
    assert hasattr(torch.cuda, name)


@pytest.mark.parametrize("name", cpu_shim.FACTORIES)
def test_replaced_factories_are_torchs(name: str):
    assert callable(getattr(torch, name))


def test_every_row_has_a_reason():
    for table in (cpu_shim.CUDA, cpu_shim.MODULES, cpu_shim.SYMBOLS, cpu_shim.METHODS, cpu_shim.FILTERS):
        assert all(isinstance(row[-1], str) and row[-1] for row in table)


INSTALLED = """
import torch
before = {name: getattr(torch.cuda, name) for name in dir(torch.cuda)}
from nemo_aligner.parallel import cpu_shim
cpu_shim.import_megatron()
import megatron.core.tensor_parallel.random as random
import megatron.core.optimizer.optimizer as optimizer
factories = {name: getattr(torch, name) for name in cpu_shim.FACTORIES}
cpu_shim.install()
import megatron.core.models.bert.bert_lm_head as late
cpu_shim.install()

assert {name: getattr(torch.cuda, name) for name in before} == before
assert {name: getattr(torch, name) for name in factories} == factories
assert not torch.cuda.is_initialized()

for module in (random, optimizer, late):
    inside = module.torch
    assert inside is not torch
    assert inside.cuda.current_device() == torch.device("cpu")
    assert inside.zeros(2, device="cuda").device.type == "cpu"
    assert inside.empty(2, device=inside.cuda.current_device()).device.type == "cpu"
    assert inside.Tensor is torch.Tensor and inside.nn is torch.nn
try:
    torch.zeros(1, device="cuda")
except (AssertionError, RuntimeError):
    pass
else:
    raise SystemExit("outside megatron-core, a CUDA tensor on a machine without CUDA must still fail")

x = torch.ones(2)
assert x.cuda() is x
assert x.type() == "torch.FloatTensor" and x.type() == "torch.cuda.FloatTensor"
assert x.type() != "torch.cuda.HalfTensor" and x.type(torch.float64).dtype == torch.float64

random.torch.cuda.manual_seed(5)
first = torch.rand(3)
state = random._get_cuda_rng_state()
second = torch.rand(3)
random._set_cuda_rng_state(state)
assert torch.equal(torch.rand(3), second)
torch.random.default_generator.manual_seed(5)
assert torch.equal(torch.rand(3), first)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is for machines without CUDA")
def test_installed_it_changes_megatron_alone():
    """In a process of its own, for here it may be installed already."""
    done = subprocess.run([sys.executable, "-c", INSTALLED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
