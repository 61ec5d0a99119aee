# SPDX-License-Identifier: Apache-2.0
"""Models of equal content have equal digests, packed or not; others have others."""

import os
import shutil
import tarfile
from pathlib import Path

import pytest

from nemo_aligner.checkpoint.model_digest import model_digest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with the layout of a .nemo, with weights of several sizes."""
    folder = tmp_path / "model"
    (folder / "model_weights").mkdir(parents=True)
    (folder / "model_config.yaml").write_text("num_layers: 2\n")
    (folder / "tokenizer.json").write_text("{}")
    for name, size in (("empty", 0), ("small", 1000), ("exact", 65536), ("large", 5_000_001)):
        (folder / "model_weights" / name).write_bytes(os.urandom(size))
    return folder


def packed(folder: Path, mode: str = "w") -> Path:
    path = folder.with_suffix(".nemo")
    with tarfile.open(path, mode) as tar:
        for file in sorted(folder.rglob("*"), reverse=True):
            if file.is_file():
                tar.add(file, f"./{file.relative_to(folder)}")
    return path


def test_where_and_how_a_model_lies_is_of_no_matter(model: Path, tmp_path: Path):
    shutil.copytree(model, tmp_path / "other")
    os.utime(tmp_path / "other/model_config.yaml", (0, 0))
    (tmp_path / "other/config.yaml").write_text("not the model's")
    assert model_digest(model) == model_digest(tmp_path / "other") == model_digest(packed(model))


def test_a_compressed_one_goes_by_its_bytes(model: Path):
    assert len(model_digest(packed(model, "w:gz"))) == 32


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "model_config.yaml").write_text("num_layers: 3\n"),
        lambda folder: (folder / "model_weights/empty").unlink(),
        lambda folder: (folder / "model_weights/small").rename(folder / "model_weights/other"),
        lambda folder: (folder / "model_weights/small").write_bytes(os.urandom(1000)),
        lambda folder: (folder / "model_weights/large").write_bytes(os.urandom(5_000_001)),
    ],
    ids=["config", "file gone", "name", "small", "large"],
)
def test_another_model_has_another_digest(model: Path, change):
    before = model_digest(model)
    change(model)
    assert model_digest(model) != before
    assert model_digest(packed(model)) != before
