# SPDX-License-Identifier: Apache-2.0
"""The folder of shared weights goes with its owner, or with the next one."""

import os
from pathlib import Path

import pytest

from nemo_aligner.launch import shared_folder
from nemo_aligner.models.gpt.peft_config import SHARED_FOLDER_VARIABLE


def test_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shared_folder, "MEMORY", tmp_path)
    left = tmp_path / f"{shared_folder.PREFIX}left"
    left.mkdir()
    (left / "owner").write_text(f"{os.getpid()} 0.0")  # of another process with the same number
    with shared_folder.shared_folder(), shared_folder.shared_folder():
        assert len(list(tmp_path.iterdir())) == 2, "the owner of the first one lives"
        assert Path(os.environ[SHARED_FOLDER_VARIABLE]).parent == tmp_path
    assert SHARED_FOLDER_VARIABLE not in os.environ
    assert list(tmp_path.iterdir()) == []
