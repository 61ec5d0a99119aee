# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine's layers and optimizer against ours: what is stored and computed, and from one to the other."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_aligner.parallel import world

sys.path.insert(0, str(Path(__file__).parent))
import recipe
from recipe import CROSSED, FAMILIES

ROOT = Path(__file__).parents[2]
WHEEL = ROOT / ".cache/transformer-engine-2.20.2"

pytestmark = pytest.mark.skipif(
    not WHEEL.is_dir(), reason=f"{WHEEL.relative_to(ROOT)} is missing, which `make test` fetches"
)


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with world.ensure_single_process():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("te")


@pytest.fixture(scope="module")
def ours(folder: Path) -> dict[str, dict[str, Any]]:
    return {family: recipe.measure(family, folder / f"local-{family}") for family in FAMILIES}


@pytest.fixture(scope="module")
def theirs(folder: Path, ours: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Made in a process of its own, where Megatron finds Transformer Engine."""
    assert ours
    done = subprocess.run(
        [sys.executable, recipe.__file__, WHEEL, folder],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (folder / "used").read_text() == "transformer_engine transformer_engine"
    return {family: torch.load(folder / f"te-{family}.pt") for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_is_stored(ours: dict, theirs: dict, family: str):
    for name in ("keys", "keys of a reward model"):
        assert theirs[family][name] == ours[family][name]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_is_computed(ours: dict, theirs: dict, family: str):
    assert torch.equal(theirs[family]["answers"], ours[family]["answers"])
    names = ("logprobs", "packed", "their logprobs", "steps", "later steps", "logprobs after")
    for name in names:
        torch.testing.assert_close(theirs[family][name], ours[family][name], **tolerance(family))


@pytest.mark.parametrize("family", CROSSED)
def test_a_run_goes_on_with_the_other(folder: Path, ours: dict, theirs: dict, family: str):
    """As the one that saved it would have gone on."""
    torch.testing.assert_close(theirs[family]["from local"], ours[family]["later steps"], **tolerance(family))
    found = recipe.go_on(family, folder / f"te-{family}")
    torch.testing.assert_close(found, theirs[family]["later steps"], **tolerance(family))


def tolerance(family: str) -> dict[str, float]:
    exact = recipe.dtype(family) == torch.float32
    return {"rtol": 2e-5, "atol": 2e-5} if exact else {"rtol": 2e-2, "atol": 2e-2}
