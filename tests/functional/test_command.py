# SPDX-License-Identifier: Apache-2.0
"""The command as a person types it, in processes of its own."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMMAND = ("-m", "nemo_aligner")
# Whoever imports torch here gets a traceback.
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
sys.argv[0] = "nemo-aligner"
runpy.run_module("nemo_aligner", run_name="__main__")
"""


def quick(
    *words: object, folder: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What needs no torch."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *map(str, words)],
        cwd=folder,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "SECRET_TOKEN": "hunter2"}
        | (env or {}),
        capture_output=True,
        text=True,
        check=False,
    )


def refused(*words: object, folder: Path) -> str:
    done = quick(*words, folder=folder)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_rows(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"input": f"n {i}", "output": str(i)}) + "\n" for i in range(count)))
    return path


def test_a_first_fine_tune_of_three_rows(run: Callable, hf_folder: Path, tmp_path: Path):
    write_rows(tmp_path / "rows.jsonl", 3)
    job = run(["sft", f"model={hf_folder}", "data=rows.jsonl", "out=results"], command=COMMAND)
    assert job.process.returncode == 0, job.err
    assert "global_batch_size=16, and there are 3 rows: a batch is all of them" in job.err
    assert "nemo-aligner chat model=results/checkpoints/megatron_gpt_sft.nemo" in job.err
    (step,) = metrics(tmp_path / "results")
    assert step["train/lr"] == 3e-5  # a tenth of one step is no warm-up


def test_many_rows_a_share_of_them_for_validation_and_two_ranks(
    run: Callable, hf_folder: Path, tmp_path: Path
):
    write_rows(tmp_path / "rows.jsonl", 200)
    words = ["data=rows.jsonl", "validation=0.1", "out=results", "lr=1e-3", "max_steps=10", "devices=2"]
    job = run(["sft", f"model={hf_folder}", *words], command=COMMAND)
    assert job.process.returncode == 0, job.err
    assert "180 training and 20 validation samples" in job.err
    assert "DP 2" in job.err
    steps = metrics(tmp_path / "results")
    losses = [step["train/loss"] for step in steps if "train/loss" in step]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.5
    assert "validation/loss" in steps[-1] | steps[-2]


def test_a_file_of_settings_is_what_config_prints_and_the_command_line_counts_more(
    run: Callable, hf_folder: Path, data: Path, tmp_path: Path
):
    printed = quick("config", "sft", f"model={hf_folder}", f"data={data}", "max_steps=3", folder=tmp_path)
    settings = yaml.safe_load(printed.stdout)
    assert settings["model"]["data"]["train_ds"]["file_path"] == str(data)
    assert settings["trainer"]["sft"]["max_steps"] == 3
    assert all("  # " in line for line in printed.stdout.splitlines())
    (tmp_path / "my.yaml").write_text(printed.stdout)
    job = run(["sft", "--config", "my.yaml", "max_steps=2", "out=results"], command=COMMAND)
    assert job.process.returncode == 0, job.err
    assert [step["step"] for step in metrics(tmp_path / "results")] == [1, 2]


def test_a_file_with_an_unknown_key_is_named(tmp_path: Path):
    (tmp_path / "my.yaml").write_text("model:\n  optim:\n    lrr: 1\n")
    told = refused("sft", "--config", "my.yaml", folder=tmp_path)
    assert "my.yaml: unknown key model.optim.lrr" in told
    assert "did you mean model.optim.lr?" in told
    assert "no.yaml: there is no such file" in refused("sft", "--config=no.yaml", folder=tmp_path)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stf"], "did you mean sft?"),
        (["sft", "modek=x"], "did you mean model=x?"),
        (["config"], "use one of"),
        (["config", "ppo"], "nemo-aligner ppo --help says what it takes"),
        (["sft", "model=none", "data=none"], "model.restore_from_path=none does not exist"),
        (["sft"], "model.restore_from_path and model.data.train_ds.file_path are not set"),
    ],
)
def test_mistakes_are_reported_before_torch(words: list[str], told: str, tmp_path: Path):
    assert told in refused(*words, folder=tmp_path)


def test_one_rank_of_many_reports_a_mistake(tmp_path: Path):
    torchrun = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for rank, says in (("0", True), ("1", False)):
        done = quick("stf", folder=tmp_path, env=torchrun | {"RANK": rank})
        assert done.returncode == 2
        assert ("did you mean sft?" in done.stderr) is says


def test_help_says_what_each_command_does_and_takes(tmp_path: Path):
    overview = quick(folder=tmp_path).stdout
    assert overview == quick("--help", folder=tmp_path).stdout
    for name in (
        "sft",
        "rm",
        "ppo",
        "serve",
        "critic",
        "generate",
        "chat",
        "import",
        "export",
        "config",
        "env",
    ):
        assert f"\n  {name} " in overview
        if name != "env":
            assert len(quick(name, "--help", folder=tmp_path).stdout) > 50
    assert "trainer.sft.max_steps" in quick("sft", "--help", folder=tmp_path).stdout


def test_env_lists_versions_and_no_secret(tmp_path: Path):
    told = quick("env", folder=tmp_path).stdout
    for name in (
        "python",
        "torch",
        "megatron-core",
        "transformers",
        "nvidia-pytriton",
        "cpu",
        "cores",
        "memory",
    ):
        assert f"\n{name} " in told
    assert "hunter2" not in told


def test_pairs_with_a_share_for_validation(run: Callable, hf_folder: Path, tmp_path: Path):
    row = json.dumps({"prompt": "a", "chosen": " yes", "rejected": " no"}) + "\n"
    (tmp_path / "pairs, it's.jsonl").write_text(row * 20)
    words = [f"model={hf_folder}", "data=pairs, it's.jsonl", "validation=0.1", "out=results"]
    job = run(["rm", *words], command=COMMAND)
    assert job.process.returncode == 0, job.err
    assert "18 training and 2 validation samples" in job.err


def test_import_chat_and_export(hf_folder: Path, tmp_path: Path):
    def command(*words: str, typed: str = "") -> str:
        return subprocess.run(
            [sys.executable, *COMMAND, *words],
            cwd=tmp_path,
            input=typed,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    command("import", f"model={hf_folder}", "out=toy.nemo")
    told = command("chat", "model=toy.nemo", "max_length=4", typed="Hello\nagain\n")
    assert len(told.splitlines()) >= 4  # what it is, and two responses
    command("export", "model=toy.nemo", "out=hf")
    assert (tmp_path / "hf/model.safetensors").is_file()
