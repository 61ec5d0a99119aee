# SPDX-License-Identifier: Apache-2.0
"""A run's folder is one run's: a second is refused, what a dead one held is taken over, and damage costs little."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM

from nemo_aligner.checkpoint.convert import import_from_huggingface
from tests.functional.conftest import SCRIPT, toy_config

ENDLESS = {
    "trainer.sft.max_steps": 1_000_000,
    "trainer.sft.val_check_interval": 0,
    "trainer.sft.save_interval": 20,
}


def test_a_folder_is_held_by_one_run_and_taken_over_when_that_is_killed(
    start: Callable, run: Callable, settings: dict[str, object], tmp_path: Path
):
    first = start(settings | ENDLESS)
    first.wait_for("-step=20-")
    second = run(settings | ENDLESS)
    assert second.wait() == 2
    problem, fix = second.err.splitlines()[-2:]
    assert problem.startswith(
        f"error: exp_manager.explicit_log_dir={tmp_path}/run is in use: another run holds it"
    )
    assert f"process {first.process.pid} on " in problem
    assert "exp_manager.explicit_log_dir to another folder" in fix
    assert first.process.poll() is None

    first.process.kill()
    first.process.wait()
    metrics = tmp_path / "run/metrics.jsonl"
    lines = metrics.read_bytes().split(b"\n")
    metrics.write_bytes(b"\n".join([lines[0], b'{"step": 2, "tr\x00', *lines[2:]]))
    last = len(lines) + 5
    again = run(settings | ENDLESS | {"trainer.sft.max_steps": last})
    assert again.wait() == 0, again.err
    assert "taken over from a run that is gone" in again.err
    assert "resumed after step " in again.err
    assert "1 line(s) are no records (line 2)" in again.err
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if '"train/loss"' in line]
    assert steps == [1, *range(3, last + 1)]
    assert not (tmp_path / "run/run.lock").exists()


def test_a_run_says_what_it_is_and_is_no_other_when_it_goes_on(
    run: Callable, settings: dict[str, object], hf_folder: Path, tmp_path: Path
):
    folder = tmp_path / "run"
    whole = run(settings | {"model.optim.lr": 1e-3})
    assert whole.wait() == 0, whole.err
    status = json.loads((folder / "status.json").read_text())
    assert [status[key] for key in ("state", "step", "max_steps", "ended_by")] == [
        "done",
        2,
        2,
        "its last step",
    ]
    command = shlex.split((folder / "command.txt").read_text().splitlines()[-1])
    assert command[1] == str(SCRIPT)
    assert "model.optim.lr=0.001" in command
    for name in ("command.txt", "config.yaml"):
        assert (folder / "checkpoints/last" / name).read_bytes() == (folder / name).read_bytes()
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["optim"]["lr"] == 1e-3

    other = tmp_path / "other.nemo"
    torch.manual_seed(1)
    shutil.copytree(hf_folder, tmp_path / "hf")
    LlamaForCausalLM(toy_config()).save_pretrained(tmp_path / "hf")
    import_from_huggingface(tmp_path / "hf", str(other))
    more = settings | {"trainer.sft.max_steps": 4}
    refused = run(
        more
        | {
            "model.restore_from_path": other,
            "trainer.precision": "bf16",
            "model.data.train_ds.max_seq_length": 128,
            "model.data.train_ds.add_eos": False,
            "model.answer_only_loss": False,
        }
    )
    assert refused.wait() == 2
    problem, fix = refused.err.splitlines()[-2:]
    for words in (
        "trainer.precision was 32, is bf16",
        "model.data.train_ds.max_seq_length was 4096, is 128",
        "model.data.train_ds.add_eos was True, is False",
        "model.answer_only_loss was True, is False",
        "model.optim.lr was 0.001, is 3e-05",  # without a word on the command line
        f"model.restore_from_path={other} holds another model",
    ):
        assert words in problem
    assert "exp_manager.resume_with_changes=True" in fix
    assert json.loads((folder / "status.json").read_text()) == status, "the refused run left its mark"

    again = run(more | {"model.optim.lr": 5e-4, "trainer.devices": 2})
    assert again.wait() == 0, again.err
    log = (folder / "log.txt").read_text()
    for words in (
        "model.optim.lr was 0.001, is 0.0005",
        "trainer.sft.max_steps was 2, is 4",
        "trainer.devices was 1, is 2",
    ):
        assert words in log


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"trainer.sft.max_steps": 100},
            "steps of the run: 100, passes over the data: 25 (trainer.sft.max_steps=100)",
        ),
        (
            {"trainer.sft.max_steps": 100, "trainer.sft.max_epochs": 1},
            "steps of the run: 4, passes over the data: 1 (",
        ),
    ],
    ids=["alone", "under max_epochs"],
)
def test_max_steps_alone_are_that_many(
    run: Callable, settings: dict[str, object], tmp_path: Path, changed: dict[str, object], words: str
):
    steps = {"trainer.sft.val_check_interval": 0, "trainer.sft.save_interval": 0}
    job = run(settings | steps | changed | {"exp_manager.create_checkpoint_callback": False})
    assert job.wait() == 0, job.err
    assert words in job.err
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(lines) == (4 if "trainer.sft.max_epochs" in changed else 100)
