# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine in every state in which a machine may have it: where it cannot be used, it is absent."""

import importlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_aligner.models.gpt.model import attention_backend
from nemo_aligner.parallel import te

META = 'raise RuntimeError("Found empty `transformer-engine` meta package installed.")'
OTHER_CUDA = 'raise OSError("libcublas.so.12: cannot open shared object file")'


def _install(folder: Path, package: str, pytorch: str | None) -> None:
    (folder / "transformer_engine").mkdir()
    (folder / "transformer_engine/__init__.py").write_text(package)
    if pytorch is not None:
        (folder / "transformer_engine/pytorch.py").write_text(pytorch)


@pytest.fixture
def fresh_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Nothing of Transformer Engine is loaded; what a test installs into ``tmp_path`` is found."""
    names = [name for name in sys.modules if name.partition(".")[0] == te.NAME]
    for name in [*names, te.NAME]:
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    return monkeypatch


@pytest.mark.parametrize(
    ("package", "pytorch", "gpu", "reason"),
    [
        pytest.param(META, None, True, "RuntimeError: Found empty", id="meta-package"),
        pytest.param(OTHER_CUDA, None, True, "OSError: libcublas.so.12", id="another-cuda"),
        pytest.param("", OTHER_CUDA, True, "OSError: libcublas.so.12", id="another-cuda-below"),
        pytest.param("", None, True, "ModuleNotFoundError: No module", id="for-jax-only"),
        pytest.param("import torch; torch.no_such_name", None, True, "AttributeError", id="another-torch"),
        pytest.param("", "", False, "there is no CUDA device", id="login-node"),
        pytest.param(META, None, False, "there is no CUDA device", id="meta-package-without-gpu"),
    ],
)
def test_one_that_cannot_be_used_is_absent(
    tmp_path: Path,
    fresh_import: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    package: str,
    pytorch: str | None,
    gpu: bool,
    reason: str,
):
    _install(tmp_path, package, pytorch)
    fresh_import.setattr(torch.cuda, "is_available", lambda: gpu)
    with caplog.at_level(logging.INFO):
        assert not te.usable.__wrapped__()
    [line] = caplog.messages
    assert line.startswith("Transformer Engine is installed and not used: ")
    assert reason in line
    with pytest.raises(ImportError):
        importlib.import_module(te.NAME)
    with pytest.raises(ImportError):
        importlib.import_module(f"{te.NAME}.pytorch")


def test_one_that_can_be_imported_is_used(tmp_path: Path, fresh_import: pytest.MonkeyPatch):
    _install(tmp_path, "", "")
    fresh_import.setattr(torch.cuda, "is_available", lambda: True)
    assert te.usable.__wrapped__()


def test_where_there_is_none_nothing_is_said(
    fresh_import: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    fresh_import.setattr(torch.cuda, "is_available", lambda: True)
    with caplog.at_level(logging.INFO):
        assert not te.usable.__wrapped__()
    assert not caplog.messages


@pytest.mark.parametrize("package", ["flash_attn", "flash_attn_interface"])
def test_flash_attention_is_cudnns_where_its_package_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
):
    assert attention_backend(True).name == "fused"
    (tmp_path / f"{package}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert attention_backend(True).name == "flash"
    assert [attention_backend(value).name for value in (None, False)] == ["auto", "unfused"]


START = """
import torch
really = torch.cuda.is_available
torch.cuda.is_available = lambda: True  # as long as Transformer Engine is tried
from nemo_aligner.parallel import cpu_shim, te
te.usable()
torch.cuda.is_available = really
cpu_shim.import_megatron()
import megatron.core.models.gpt.gpt_layer_specs as specs
assert not specs.HAVE_TE
"""


def test_megatron_is_imported_beside_the_empty_meta_package(tmp_path: Path):
    _install(tmp_path, META, None)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", START],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
