# SPDX-License-Identifier: Apache-2.0
"""Where a model is that a setting names; the hub is huggingface_hub's client before a server on this machine."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_aligner.checkpoint.sources import is_gguf, is_huggingface, peek_model
from nemo_aligner.errors import UserError
from tests.hub import serving

FIND = "import sys; from nemo_aligner.checkpoint import sources; print(sources.{}(*sys.argv[1:]))"


def ask(function: str, *words: str, env: dict[str, str], home: Path) -> subprocess.CompletedProcess[str]:
    """What a function of sources gives in a process of its own: the hub's client reads its environment once."""
    return subprocess.run(
        [sys.executable, "-c", FIND.format(function), *words],
        env=os.environ | env | {"HF_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_model_of_the_hub_is_downloaded_once(hf_folder: Callable[..., Path], tmp_path: Path, form: str):
    folder, home = hf_folder("llama2"), tmp_path / "home"
    (folder / "README.md").write_text("is of no use here")
    if form == "bin":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with serving("org/toy", folder) as env:
        peeked = ask("peek_model", "model.restore_from_path", "org/toy", env=env, home=home)
        assert peeked.returncode == 0, peeked.stderr
        assert "'num_layers': 3" in peeked.stdout
        snapshot = next((home / "hub/models--org--toy/snapshots").iterdir())
        assert [path.name for path in snapshot.iterdir()] == ["config.json"]
        found = ask("find_model", "org/toy", env=env, home=home)
    assert found.stdout.strip() == str(snapshot), found.stderr
    wanted = {path.name for path in folder.iterdir()} - {"README.md"}
    assert {path.name for path in snapshot.iterdir()} == wanted
    assert all((snapshot / name).read_bytes() == (folder / name).read_bytes() for name in wanted)
    again = ask("find_model", "org/toy", env={"HF_HUB_OFFLINE": "1"}, home=home)
    assert again.stdout.strip() == str(snapshot), again.stderr


def test_what_the_hub_lacks_is_reported_with_what_can_be_given(
    hf_folder: Callable[..., Path], tmp_path: Path
):
    with serving("org/toy", hf_folder("llama2")) as env:
        done = ask("peek_model", "rm_model_file", "org/other", env=env, home=tmp_path / "home")
    assert "UserError: rm_model_file=org/other is no file or folder here" in done.stderr
    assert "404" in done.stderr
    assert "Fix: give a .nemo file or its folder" in done.stderr


def test_forms_are_reported_by_their_content(hf_folder: Callable[..., Path], tmp_path: Path):
    folder = hf_folder("llama2")
    assert is_huggingface(folder)
    (folder / "model_config.yaml").write_text("num_layers: 7\n")
    assert not is_huggingface(folder)
    assert peek_model("x", str(folder)) == {"num_layers": 7}
    (tmp_path / "named_otherwise").write_bytes(b"GGUF\3\0\0\0")
    assert is_gguf(tmp_path / "named_otherwise")
    with pytest.raises(UserError, match="not a whole GGUF file"):
        peek_model("x", str(tmp_path / "named_otherwise"))
    for named in ("", "nowhere", "deep/down/nowhere", "org/lost.nemo"):
        with pytest.raises(UserError, match=f"x={named} does not exist"):
            peek_model("x", named)
