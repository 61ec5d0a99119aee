# SPDX-License-Identifier: Apache-2.0
"""Data sets in a folder or in the hub's cache, read by datasets itself, as rows of a file."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from huggingface_hub import constants

from nemo_aligner.data.hub import is_dataset, rows_file
from nemo_aligner.data.records import RecordFile
from nemo_aligner.errors import UserError

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "home/datasets")


def write(folder: Path, **splits: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in splits.items():
        Dataset.from_dict({"text": texts, "tags": [["é", None]] * len(texts)}).to_parquet(
            folder / f"{name}-00000-of-00001.parquet"
        )
    return folder


def texts(path: Path | str) -> list[object]:
    rows = RecordFile(path, lambda row: row)
    return [rows[i]["text"] for i in range(len(rows))]


def test_a_folder_has_splits(tmp_path: Path):
    folder = write(tmp_path / "sums", train=["a", "b"], validation=["c"])
    assert texts(folder) == ["a", "b"]
    assert texts(f"{folder}:validation") == ["c"]
    assert texts(f"{folder}:train[:1]") == ["a"]
    first = json.loads(rows_file(folder).read_text(encoding="utf-8").splitlines()[0])
    assert first == {"text": "a", "tags": ["é", None]}


def test_it_is_written_once_and_again_where_it_has_changed(tmp_path: Path):
    folder = write(tmp_path / "sums", train=["a"])
    before = rows_file(folder)
    written = before.stat().st_mtime_ns
    assert rows_file(folder) == before
    assert before.stat().st_mtime_ns == written
    write(folder, train=["a", "new"])
    assert texts(folder) == ["a", "new"]
    assert not list(before.parent.glob("*.tmp"))


def test_one_of_the_hubs_cache_needs_no_network(tmp_path: Path):
    repo = tmp_path / "home/hub/datasets--acme--sums"
    write(repo / "snapshots/0123", train=["a"], test=["b"])
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("0123")
    code = "from nemo_aligner.data.hub import rows_file; print(rows_file('acme/sums:test').read_text())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["text"] == "b"


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("results/model.nemo", False),
        ("data/train.jsonl.zst", False),
        ("acme/sums:main:test", True),
        ("acme/sums", True),
        ("acme/sums:test", True),
        ("rows/a.jsonl", False),
        ("a.jsonl", False),
        ("x/y/z", False),
    ],
)
def test_which_names_are_data_sets(path: str, wanted: bool):
    assert is_dataset(path) is wanted


def test_what_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write(tmp_path / "sums", train=["a"])
    with pytest.raises(UserError, match="Unknown split") as found:
        texts(f"{folder}:dev")
    assert "OWNER/NAME:SPLIT" in found.value.fix
    with pytest.raises(UserError, match="acme/nothing is no file or folder here"):
        texts("acme/nothing")
    shutil.rmtree(tmp_path / "home")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError) as found:
        texts(folder)
    assert "nemo-aligner[datasets]" in found.value.fix


def test_a_configuration_is_named_before_the_split(tmp_path: Path):
    folder = tmp_path / "sums"
    for name in ("main", "other"):
        write(folder / name, train=[name], test=[f"{name} test"])
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {name}/{split}-*\n" for split in ("train", "test"))
        for name in ("main", "other")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert texts(f"{folder}:other:test") == ["other test"]
    assert texts(f"{folder}:main:train[:1]") == ["main"]
    with pytest.raises(UserError, match="Config name is missing") as found:
        texts(folder)
    assert "OWNER/NAME:CONFIGURATION:SPLIT" in found.value.fix
