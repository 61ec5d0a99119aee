# SPDX-License-Identifier: Apache-2.0
"""What a person meets first: mistakes that are told before torch is loaded, a sign of life, runs of little data."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GPT = ROOT / "examples/nlp/gpt"
# Whoever imports torch here gets a traceback.
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def refused_without_torch(script: str, settings: dict[str, object], folder: Path) -> str:
    """What a script says that must not import torch, and refuses its settings."""
    words = [f"{key}={value}" for key, value in settings.items()]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(GPT / script), *words],
        cwd=folder,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Fix: ")
    return done.stderr


ROWS = {
    "COLUMN": '{"question_": "a", "text_": "b"}\n',
    "BROKEN": '{"input": "a", "output": "b"}\n{"input": \n',
    "EMPTY": "\n",
    "TEXT": '{"text": "a"}\n',
    "CHAT": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
}
DATA = "model.data.train_ds.file_path"


def write_sources(hf_folder: Path, folder: Path) -> dict[str, Path]:
    """A model, and what is none."""
    (folder / "toy.gguf").write_bytes(b"GGUF\3\0\0\0")
    for name in ("empty", "bert", "shard"):
        (folder / name).mkdir()
    (folder / "bert/config.json").write_text('{"architectures": ["BertModel"]}')
    (folder / "shard/model.safetensors.index.json").write_text('{"weight_map": {"x": "lost.safetensors"}}')
    (folder / "shard/config.json").write_text((hf_folder / "config.json").read_text())
    return {
        "HF": hf_folder,
        "EMPTY_FOLDER": folder / "empty",
        "BERT": folder / "bert",
        "SHARD": folder / "shard",
        "WEIGHTS": hf_folder / "model.safetensors",
        "GGUF": folder / "toy.gguf",
    }


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"model.data.train_ds.file_path": "no.jsonl"},
            ["model.data.train_ds.file_path=no.jsonl does not exist"],
        ),
        (
            {"trainer.devices": 4, "model.pipeline_model_parallel_size": 4},
            ["model.pipeline_model_parallel_size=4", "num_layers=2", "[1, 2]"],
        ),
        (
            {
                "model.tensor_model_parallel_size": 3,
                "trainer.devices": 3,
                "model.data.train_ds.global_batch_size": 12,
            },
            ["num_attention_heads=4"],
        ),
        ({DATA: "COLUMN"}, ["COLUMN.jsonl, line 1: key 'input' is missing", "['question_', 'text_']"]),
        ({DATA: "BROKEN"}, ["BROKEN.jsonl, line 2"]),
        ({DATA: "EMPTY"}, ["EMPTY.jsonl has no rows"]),
        ({DATA: "CHAT"}, ["CHAT.jsonl, line 1", "model.data.chat=True"]),
        ({DATA: "TEXT", "model.data.chat": True}, ["TEXT.jsonl, line 1", "model.data.chat=False"]),
        (
            {"model.restore_from_path": "Qwen/Qwen3-0.6B"},
            ["model.restore_from_path=Qwen/Qwen3-0.6B is no file", "downloaded", "a Hugging Face folder"],
        ),
        (
            {"model.restore_from_path": "HF", "trainer.devices": 4, "model.pipeline_model_parallel_size": 4},
            ["num_layers=2", "[1, 2]"],
        ),
        (
            {
                "model.restore_from_path": "HF",
                "trainer.devices": 3,
                "model.tensor_model_parallel_size": 3,
                "model.data.train_ds.global_batch_size": 12,
            },
            ["num_attention_heads=4"],
        ),
        ({"model.restore_from_path": "EMPTY_FOLDER"}, ["has no config.json", "model_config.yaml"]),
        (
            {"model.restore_from_path": "BERT"},
            ["architecture BertModel is not supported", "LlamaForCausalLM"],
        ),
        ({"model.restore_from_path": "SHARD"}, ["names lost.safetensors, which is not in"]),
        ({"model.restore_from_path": "WEIGHTS"}, ["holds weights alone", "give the folder that it is of"]),
        ({"model.restore_from_path": "GGUF"}, ["toy.gguf is not a whole GGUF file"]),
    ],
    ids=[
        *("no data", "layers", "heads", "a wrong column", "a broken line", "no rows", "a chat", "no chat"),
        *("a hub id", "layers of Hugging Face's", "heads of Hugging Face's", "no config", "another family"),
        *("a lost shard", "weights alone", "a damaged GGUF file"),
    ],
)
def test_told_before_torch(
    settings: dict[str, object], hf_folder: Path, tmp_path: Path, changed: dict[str, object], words: list[str]
):
    sources = write_sources(hf_folder, tmp_path)
    for name, text in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    made = {name: tmp_path / f"{name}.jsonl" for name in ROWS}
    for name, path in {**made, **sources}.items():
        changed = {key: path if value == name else value for key, value in changed.items()}
    told = refused_without_torch("train_gpt_sft.py", settings | changed, tmp_path)
    assert [word for word in words if word not in told] == [], told


def test_an_output_that_is_there_is_reported_before_torch(settings: dict[str, object], tmp_path: Path):
    result = tmp_path / "run/checkpoints/megatron_gpt_sft.nemo"
    result.parent.mkdir(parents=True)
    result.touch()
    assert f"{result} exists" in refused_without_torch("train_gpt_sft.py", settings, tmp_path)


@pytest.mark.parametrize(
    ("script", "word"),
    [
        ("train_reward_model.py", "is no pair and no text"),
        ("train_gpt_ppo_actor.py", "key 'text' is missing"),
    ],
)
def test_rows_of_other_scripts_are_reported_before_torch(script: str, word: str, nemo: Path, tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text(ROWS["COLUMN"])
    settings: dict[str, object] = {
        "pretrained_checkpoint.restore_from_path": nemo,
        "model.data.data_prefix": "{train: [rows.jsonl], validation: [rows.jsonl]}",
    }
    told = refused_without_torch(script, settings, tmp_path)
    assert "rows.jsonl, line 1" in told
    assert word in told


def test_all_missing_settings_are_reported_at_once(tmp_path: Path):
    told = refused_without_torch("train_gpt_sft.py", {}, tmp_path)
    assert "model.restore_from_path and model.data.train_ds.file_path are not set" in told
    told = refused_without_torch("train_reward_model.py", {"lr": 1}, tmp_path)
    assert told.endswith("Fix: did you mean model.optim.lr?\n")


def test_a_run_without_validation_and_a_name_that_is_a_number(
    run: Callable, settings: dict[str, object], tmp_path: Path
):
    folder = tmp_path / "2025_06_01, it's a=b"
    del settings["model.data.validation_ds.file_path"], settings["trainer.precision"]
    job = run(
        settings
        | {"exp_manager.explicit_log_dir": folder, "name": "1e3", "trainer.sft.val_check_interval": 1}
    )
    assert job.wait() == 0, job.err
    assert "no validation samples" in job.err
    assert "trainer.precision=32, as there is no GPU" in job.err
    assert (folder / "checkpoints/1e3.nemo").is_file()
    names = sorted(
        path.name for path in (folder / "checkpoints").iterdir() if path.is_dir() and not path.is_symlink()
    )
    assert names == [f"1e3-step={n}-consumed_samples={8 * n}-epoch=0" for n in (1, 2)]
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]


def test_each_rank_shows_its_stacks_and_trains_on(start: Callable, settings: dict[str, object]):
    endless = {"trainer.devices": 2, "trainer.sft.max_steps": -1, "trainer.sft.max_epochs": 10**6}
    job = start(settings | endless)
    job.wait_for("step 1/")
    job.process.send_signal(signal.SIGUSR2)
    job.wait_for("SIGUSR2: the stacks of rank 1 (process ")
    deadline = time.monotonic() + 60
    while "supervised.py" not in job.err.partition("of rank 1 (process ")[2] and time.monotonic() < deadline:
        time.sleep(0.1)
    before, _, after = job.err.partition("SIGUSR2: the stacks of rank 1 (process ")
    stacks = before.partition("SIGUSR2: the stacks of rank 0 (process ")[2], after
    assert all("supervised.py" in text for text in stacks)
    assert len(job.alive()) == 2
