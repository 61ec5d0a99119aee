# SPDX-License-Identifier: Apache-2.0
"""One flipped byte in any file of a checkpoint or a .nemo is told by the file; an older whole checkpoint is named."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import hydra
import pytest
import torch
import yaml

from nemo_aligner.builders import load_policy, open_experiment, resume_point
from nemo_aligner.checkpoint.nemo_archive import open_nemo
from nemo_aligner.checkpoint.trainer_state import Checkpoint
from nemo_aligner.config.sft import SFTJob
from nemo_aligner.errors import UserError
from nemo_aligner.parallel import world
from nemo_aligner.settings import parse
from tests.functional.run_folder import tensors

CONF = Path(__file__).parents[2] / "examples/nlp/gpt/conf"


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with world.ensure_single_process():
        yield


@pytest.fixture(scope="session")
def runs() -> dict[str, Path]:
    """The folder of a run of four steps with a checkpoint of each, made when first asked for."""
    return {}


@pytest.fixture
def whole(
    settings: dict[str, object], run: Callable, runs: dict, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    if "folder" not in runs:
        runs["folder"] = tmp_path_factory.mktemp("whole") / "run"
        job = run(saving(settings, runs["folder"]))
        assert job.wait() == 0, job.err
    return runs["folder"]


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def saving(settings: dict[str, object], folder: Path, **changed: object) -> dict[str, object]:
    return settings | {
        "trainer.sft.max_steps": 4,
        "trainer.sft.save_interval": 1,
        "trainer.sft.val_check_interval": 2,
        "exp_manager.explicit_log_dir": folder,
        **changed,
    }


def resumed(settings: dict[str, object]) -> Checkpoint | None:
    """What a run of these settings goes on from."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        job = parse(hydra.compose("gpt_sft", [f"++{key}={value}" for key, value in settings.items()]), SFTJob)
    with open_experiment(job) as run:
        return resume_point(job, run)


def newest(folder: Path) -> Path:
    return (folder / "checkpoints/last").resolve()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_one_flipped_byte_in_any_file_is_reported_by_the_file(settings: dict[str, object], folder: Path):
    asked = saving(settings, folder)
    assert resumed(asked).state.step == 4
    files = sorted(path for path in newest(folder).rglob("*") if path.is_file())
    names = [path.relative_to(newest(folder)).as_posix() for path in files]
    assert {"model_weights/__0_0.distcp", "training_state/__0_0.distcp", "model_weights/metadata.json"} < set(
        names
    )
    assert {"trainer_state.json", "config.yaml", "command.txt", "model_config.yaml", "tokenizer.json"} & set(
        names
    )
    for path, name in zip(files, names, strict=True):
        before = path.read_bytes()
        flip(path)
        with pytest.raises(UserError) as caught:
            resumed(asked)
        path.write_bytes(before)
        text = str(caught.value)
        assert str(newest(folder)) in text
        assert name in text or name == "digests.json"
        assert "step=3" in text
        assert "exp_manager.resume_from_older_if_damaged=True" in text


def test_a_checkpoint_without_digests_is_gone_on_from(
    settings: dict[str, object], folder: Path, caplog: pytest.LogCaptureFixture
):
    (newest(folder) / "digests.json").unlink()
    with caplog.at_level("INFO"):
        assert resumed(saving(settings, folder)).state.step == 4
    assert "was written without digests: its files are not checked" in caplog.text


def test_damaged_ones_are_set_aside_and_the_run_goes_on_as_if_they_never_were(
    settings: dict[str, object], run: Callable, whole: Path, folder: Path
):
    damaged = newest(folder), next((folder / "checkpoints").glob("*-step=2-*"))
    flip(damaged[0] / "training_state/__0_0.distcp")
    (damaged[1] / "trainer_state.json").write_text("{}")
    (folder / "checkpoints/megatron_gpt_sft.nemo").unlink()
    job = run(saving(settings, folder, **{"exp_manager.resume_from_older_if_damaged": True}))
    assert job.wait() == 0, job.err
    assert "resumed after step 3 of 4" in job.err
    assert sorted(path.name for path in (folder / "checkpoints/damaged").iterdir()) == sorted(
        p.name for p in damaged
    )
    ours, theirs = tensors(folder), tensors(whole)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().split(b"\n") if line]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]


def test_where_nothing_is_whole_it_is_said(settings: dict[str, object], folder: Path):
    for path in (folder / "checkpoints").glob("*step=*"):
        flip(path / "model_weights/__0_0.distcp")
    asked = saving(settings, folder, **{"exp_manager.resume_from_older_if_damaged": True})
    with pytest.raises(UserError, match="no older checkpoint beside it is whole"):
        resumed(asked)
    assert not (folder / "checkpoints/damaged").exists()


def test_a_checkpoint_of_another_run_is_left_where_it_is(
    settings: dict[str, object], folder: Path, tmp_path: Path
):
    flip(newest(folder) / "model_weights/__0_0.distcp")
    named = {"exp_manager.resume_from_checkpoint": f"'{newest(folder)}'"}
    for more in ({}, {"exp_manager.resume_from_older_if_damaged": True}):
        with pytest.raises(UserError, match=r"exp_manager\.resume_from_checkpoint=\S+-step=3-"):
            resumed(saving(settings, tmp_path / "other", **named, **more))


def test_an_extracted_nemo_may_have_its_config_edited(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with open_nemo(whole / "checkpoints/megatron_gpt_sft.nemo") as archive:
        shutil.copytree(archive.folder, tmp_path / "model")
    path = tmp_path / "model/model_config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"hidden_dropout": 0.125}))
    with open_nemo(tmp_path / "model") as archive:
        assert archive.config["hidden_dropout"] == 0.125
    assert "model_config.yaml has " in caplog.text


@pytest.mark.parametrize("packed", [True, False], ids=["file", "folder"])
def test_one_flipped_byte_in_a_nemo_is_reported(
    settings: dict[str, object], whole: Path, tmp_path: Path, packed: bool
):
    path = tmp_path / "model.nemo"
    source = whole / "checkpoints/megatron_gpt_sft.nemo"
    if packed:
        shutil.copy(source, path)
        content = path.read_bytes()
        with open_nemo(path) as archive:
            weights = next(archive.weights.glob("*.distcp")).read_bytes()
        at = content.index(weights) + len(weights) // 2
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
    else:
        with open_nemo(source) as archive:
            shutil.copytree(archive.folder, path)
        flip(path / "model_weights/__0_0.distcp")
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        words = [f"++{key}={value}" for key, value in (settings | {"model.restore_from_path": path}).items()]
        job = parse(hydra.compose("gpt_sft", words), SFTJob)
    for read in (lambda: load_policy(job), lambda: open_nemo(path).__enter__()):
        with pytest.raises(
            UserError, match=rf"{path} is damaged: model_weights/__0_0\.distcp differs from its digest"
        ):
            read()
