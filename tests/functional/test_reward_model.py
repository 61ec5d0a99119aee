# SPDX-License-Identifier: Apache-2.0
"""train_reward_model.py as a process: the tutorial's commands, what it saves, layouts, and labelled responses."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from nemo_aligner.checkpoint.convert import export_to_huggingface
from nemo_aligner.checkpoint.nemo_archive import open_nemo

SCRIPT = [Path(__file__).parents[2] / "examples/nlp/gpt/train_reward_model.py"]
COLOURS = ("red", "green", "blue", "yellow")  # the earlier one is preferred


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pairs as the tutorial writes them: chosen and rejected on lines of their own."""
    draw, rows = random.Random(0), []
    for _ in range(48):
        better, worse = sorted(draw.sample(range(4), 2))
        prompt = f"User: thing {draw.randint(0, 99)}?\n\nAssistant:"
        rows += [{"text": f"{prompt} {COLOURS[better]}"}, {"text": f"{prompt} {COLOURS[worse]}"}]
    return write(tmp_path_factory.mktemp("pairs") / "comparisons.jsonl", rows)


@pytest.fixture
def settings(nemo: Path, pairs: Path, tmp_path: Path) -> dict[str, object]:
    """A toy run that learns the order of colours."""
    return {
        "pretrained_checkpoint.restore_from_path": nemo,
        "model.data.data_prefix": f"{{train: [{pairs}], validation: [{pairs}], test: [{pairs}]}}",
        "model.micro_batch_size": 4,
        "model.global_batch_size": 16,
        "model.optim.lr": 1e-3,
        "model.optim.sched.constant_steps": 0,
        "model.optim.sched.warmup_steps": 1,
        "trainer.precision": 32,
        "trainer.rm.max_epochs": 8,
        "trainer.rm.val_check_interval": 12,
        "exp_manager.explicit_log_dir": tmp_path / "run",
        "exp_manager.create_tensorboard_logger": False,
    }


def test_it_learns_what_people_prefer_and_goes_to_hugging_face(
    run: Callable, settings: dict[str, object], tmp_path: Path
):
    job = run(settings | {"model.reward_standardization.enable": True}, command=SCRIPT)
    assert job.wait() == 0, job.err
    found = lines(tmp_path / "run/metrics.jsonl")
    last = [line for line in found if "validation/acc" in line][-1]
    assert last["validation/acc"] == 1.0
    assert last["validation/rewards_chosen_mean"] > last["validation/rewards_rejected_mean"]
    assert [line for line in found if "train/loss" in line][-1]["train/consumed_samples"] == 24 * 16
    nemo = tmp_path / "run/checkpoints/megatron_gpt.nemo"
    with open_nemo(nemo) as archive:
        assert archive.config["reward_model_type"] == "binary_ranking"
        served = archive.config["reward_standardization"]
    assert served["mean"] == pytest.approx(last["validation/rewards_all_mean"])
    assert served["std"] == pytest.approx(last["validation/rewards_all_std"])
    export_to_huggingface(nemo, tmp_path / "hf")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").config.num_labels == 1


def test_further_validation_sets(run: Callable, settings: dict[str, object], pairs: Path, tmp_path: Path):
    other = write(
        tmp_path / "other.jsonl",
        [{"text": "User: a?\n\nAssistant: red"}, {"text": "User: a?\n\nAssistant: blue"}],
    )
    prefix = f"{{train: [{pairs}], validation: [{pairs}], validation_short: [{other}]}}"
    job = run(settings | {"model.data.data_prefix": prefix, "trainer.rm.max_steps": 1}, command=SCRIPT)
    assert job.wait() == 0, job.err
    last = lines(tmp_path / "run/metrics.jsonl")[-1]
    assert {"validation/acc", "validation_short/acc"} <= last.keys()
    assert last["validation/loss"] != last["validation_short/loss"]
    (checkpoint,) = (tmp_path / "run/checkpoints").glob("megatron_gpt--val_loss=*")
    assert f"val_loss={last['validation/loss']:.3f}" in checkpoint.name


def test_results_do_not_depend_on_the_layout(run: Callable, settings: dict[str, object], tmp_path: Path):
    few = {"trainer.rm.max_steps": 3, "trainer.rm.val_check_interval": 3, "trainer.rm.save_interval": 0}
    layout = {
        "trainer.devices": 4,
        "model.tensor_model_parallel_size": 2,
        "model.pipeline_model_parallel_size": 2,
        "model.sequence_parallel": True,
        "model.micro_batch_size": 2,
    }
    folders = [tmp_path / "one", tmp_path / "four"]
    for folder, changed in zip(folders, ({}, layout), strict=True):
        job = run(settings | few | changed | {"exp_manager.explicit_log_dir": folder}, command=SCRIPT)
        assert job.wait() == 0, job.err
    one, four = (lines(folder / "metrics.jsonl") for folder in folders)
    timing = ("time", "train/step_time", "train/tokens_per_s", "validation/step_time")
    for left, right in zip(one, four, strict=True):
        assert left.keys() == right.keys()
        for name in left.keys() - set(timing):
            assert left[name] == pytest.approx(right[name], rel=1e-4), name


@pytest.mark.parametrize(("precision", "head"), [("bf16", "float32"), ("32", "bfloat16")])
def test_the_heads_own_dtype(
    run: Callable, settings: dict[str, object], tmp_path: Path, precision: str, head: str
):
    job = run(
        settings
        | {"trainer.precision": precision, "model.force_head_dtype": head, "trainer.rm.max_epochs": 4},
        command=SCRIPT,
    )
    assert job.wait() == 0, job.err
    assert lines(tmp_path / "run/metrics.jsonl")[-1]["validation/acc"] > 0.9
    assert (tmp_path / "run/checkpoints/megatron_gpt.nemo").is_file()


# The terminal command of the tutorial, its flags as printed, paths replaced and two ranks for eight.
TERMINAL = """\
trainer.num_nodes=1 trainer.devices=2 ++model.micro_batch_size=1 ++model.global_batch_size=16
++model.data.data_impl=jsonl pretrained_checkpoint.restore_from_path={model} exp_manager.create_wandb_logger=False
exp_manager.wandb_logger_kwargs.project=rm_training exp_manager.wandb_logger_kwargs.name=rm_training
exp_manager.explicit_log_dir={results}"""

# What the tutorial's Slurm script adds, wandb left offline.
SLURM = """\
trainer.rm.save_interval=500 trainer.rm.val_check_interval=100 trainer.rm.limit_val_batches=100000"""


@pytest.mark.parametrize("more", ["", SLURM], ids=["terminal", "slurm"])
def test_the_tutorials_commands(run: Callable, nemo: Path, pairs: Path, tmp_path: Path, more: str):
    words = [
        *TERMINAL.format(model=nemo, results=tmp_path / "results").split(),
        *more.split(),
        f"{'++' if more else ''}model.data.data_prefix={{train: [{pairs}], validation: [{pairs}], test: [{pairs}]}}",
        *("trainer.precision=32", "trainer.rm.max_steps=1"),
    ]
    job = run(words, command=SCRIPT)
    assert job.wait() == 0, job.err
    assert "validation/acc" in lines(tmp_path / "results/metrics.jsonl")[-1]
    assert (tmp_path / "results/checkpoints/megatron_gpt.nemo").is_file()


@pytest.mark.parametrize("loss", ["regression", "regular_bt", "margin_bt", "scaled_bt"])
def test_labelled_responses(run: Callable, settings: dict[str, object], tmp_path: Path, loss: str):
    rows: list[dict[str, object]] = []
    for index in range(48):
        better, worse = sorted(random.Random(index).sample(range(4), 2))
        prompt, strength = f"User: thing {index}?\n\nAssistant:", worse - better
        for colour in (better, worse):
            label = [4.0 - colour, -100] if loss == "regression" else [-strength, -100]
            rows.append({"text": f"{prompt} {COLOURS[colour]}", "label": label})
    data = write(tmp_path / "labels.jsonl", rows)
    judged = {
        "model.reward_model_type": "regression",
        "model.regression.num_attributes": 2,
        "model.regression.loss_func": loss,
        "model.data.data_prefix": f"{{train: [{data}], validation: [{data}], test: [{data}]}}",
    }
    job = run(settings | judged, command=SCRIPT)
    assert job.wait() == 0, job.err
    found = lines(tmp_path / "run/metrics.jsonl")
    last = [line for line in found if "train/loss" in line][-1]
    assert last["train/consumed_samples"] == last["step"] * 16, "labeled responses, or pairs of them"
    found = [line for line in found if "validation/loss" in line]
    assert found[-1]["validation/loss"] < 0.5 * found[0]["validation/loss"] or (
        found[-1].get("validation/acc") == 1.0
    )


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model.reward_model_type": "pairwise"}, ("reward_model_type=pairwise", "binary_ranking")),
        ({"model.force_head_dtype": "int8"}, ("force_head_dtype=int8", "float32")),
        (
            {"model.regression.num_attributes": 2, "model.regression.attribute_weights": "[1.0]"},
            ("attribute_weights", "num_attributes=2"),
        ),
        ({"model.global_batch_size": 10}, ("global_batch_size=10", "global_batch_size=12")),
        ({"model.data.data_prefix": "{train: [x.jsonl]}"}, ("data_prefix",)),
        ({"pretrained_checkpoint.restore_from_path": "missing.nemo"}, ("restore_from_path=missing.nemo",)),
    ],
    ids=str,
)
def test_bad_settings(
    run: Callable, settings: dict[str, object], changed: dict[str, object], words: tuple[str, ...]
):
    job = run(settings | changed, command=SCRIPT)
    assert job.wait() == 2, job.err
    assert all(word in job.err for word in words), job.err
    assert "Fix: " in job.err
    assert "Traceback" not in job.err
