# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimisation, end to end: what is learned, where it starts, layouts, kills, both references."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.functional.conftest import COLOURS, LAYOUTS, MIXED, ROOT, toy_config, write_toy_tokenizer
from tests.functional.run_folder import metrics
from tests.functional.test_resume import assert_same_run

DPO = ROOT / "examples/nlp/gpt/train_gpt_dpo.py"
STEPS = 16


@pytest.fixture
def settings(nemo: Path, tmp_path: Path) -> Callable[..., dict[str, object]]:
    """Settings of a toy run in a folder of the name."""
    pairs = tmp_path / "pairs.jsonl"
    # The earlier colour is preferred.
    rows = [
        {"prompt": f"thing {i}:", "chosen": f" {COLOURS[i % 3]}", "rejected": f" {COLOURS[i % 3 + 1]}"}
        for i in range(32)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(name: str, **changed: object) -> dict[str, object]:
        return {
            "pretrained_checkpoint.restore_from_path": nemo,
            "model.data.data_prefix": f"{{train: [{pairs}], validation: [{pairs}], test: [{pairs}]}}",
            "model.micro_batch_size": 4,
            "model.global_batch_size": 8,
            "model.optim.lr": 1e-3,
            "model.optim.sched.warmup_steps": 2,
            "model.optim.sched.constant_steps": 0,
            "model.hidden_dropout": 0.1,
            "trainer.precision": 32,
            "trainer.dpo.max_epochs": STEPS // 4,
            "trainer.dpo.val_check_interval": 8,
            "trainer.dpo.save_interval": 4,
            "exp_manager.explicit_log_dir": tmp_path / name,
            "exp_manager.checkpoint_callback_params.save_top_k": 1,
            "exp_manager.create_tensorboard_logger": False,
        } | changed

    return make


def steps(folder: Path) -> list[dict[str, float]]:
    return [line for line in metrics(folder) if "train/loss" in line]


# The loss of the first step, where the policy is the reference; None: there is no reference.
STARTS = {
    "dpo": math.log(2),
    "rpo_bwd_kl": math.log(2) - 0.731059 * math.log(1 + math.exp(-1)) - 0.268941 * math.log(1 + math.exp(1)),
    "orpo": None,
}


@pytest.mark.parametrize("loss", STARTS)
def test_the_chosen_responses_are_learned(settings: Callable, run: Callable, tmp_path: Path, loss: str):
    asked = {"model.dpo.preference_loss": loss, "model.hidden_dropout": 0.0}
    job = run(settings("run", **asked), command=[DPO])
    assert job.process.returncode == 0, job.err[-3000:]
    first, last = steps(tmp_path / "run")[0], steps(tmp_path / "run")[-1]
    if (start := STARTS[loss]) is not None:
        assert first["train/preference_loss"] == pytest.approx(start, abs=1e-6)
        assert first["train/rewards_all_mean"] == 0
    assert last["train/acc"] == 1
    assert last["train/loss"] < 0.8 * first["train/loss"]
    assert last["train/rewards_chosen_mean"] > last["train/rewards_rejected_mean"]
    assert "⟦ red</s>⟧" in job.err


def test_a_renewed_reference_is_the_policy_as_it_was(settings: Callable, run: Callable, tmp_path: Path):
    asked = {"model.dpo.renew_reference_every": 3, "model.hidden_dropout": 0.0, "trainer.dpo.max_steps": 7}
    job = run(settings("run", **asked), command=[DPO])
    assert job.process.returncode == 0, job.err[-3000:]
    losses = {line["step"]: line["train/preference_loss"] for line in steps(tmp_path / "run")}
    assert [step for step, loss in losses.items() if abs(loss - math.log(2)) < 1e-6] == [1, 4, 7]
    job = run(settings("both", **asked, **{"model.dpo.store_reference": True}), command=[DPO])
    assert job.process.returncode == 2
    assert "Fix: set model.dpo.store_reference=False" in job.err


def test_damaged_log_probs_of_the_reference_are_reported(settings: Callable, run: Callable, tmp_path: Path):
    asked = settings("run", **{"model.dpo.store_reference": True, "trainer.dpo.max_steps": 1})
    assert run(asked, command=[DPO]).process.returncode == 0
    kept = tmp_path / "run/reference_logprobs/train/000000.pt"
    kept.write_bytes(kept.read_bytes()[:-100])
    job = run(asked | {"trainer.dpo.max_steps": 2}, command=[DPO])
    assert job.process.returncode == 2, job.err[-3000:]
    assert f"{kept} is damaged" in job.err
    assert "Fix: remove it" in job.err


def test_stored_log_probs_are_of_this_model(
    settings: Callable, run: Callable, hf_folder: Path, tmp_path: Path
):
    """A folder without a checkpoint is begun anew, with whichever model is named then."""
    other = tmp_path / "other"
    torch.manual_seed(1)
    LlamaForCausalLM(toy_config()).save_pretrained(other)
    write_toy_tokenizer(other)
    few = {"model.dpo.store_reference": True, "trainer.dpo.max_steps": 1, "model.hidden_dropout": 0.0}
    unsaved = {
        "exp_manager.create_checkpoint_callback": False,
        "exp_manager.checkpoint_callback_params.save_nemo_on_train_end": False,
    }
    asked = settings("run", **few, **unsaved)
    for model in (hf_folder, other):
        job = run(asked | {"pretrained_checkpoint.restore_from_path": model}, command=[DPO])
        assert job.process.returncode == 0, job.err[-3000:]
        assert steps(tmp_path / "run")[0]["train/rewards_all_std"] < 1e-4


@pytest.mark.parametrize(
    "changed",
    [
        {"model.dpo.preference_loss": "rpo_sq", "model.dpo.store_reference": True},
        {"model.dpo.renew_reference_every": 3},
        pytest.param({"model.dpo.store_reference": False}, marks=pytest.mark.resume),
        pytest.param({"model.dpo.preference_loss": "orpo"}, marks=pytest.mark.resume),
    ],
    ids=str,
)
def test_a_killed_run_goes_on_bit_for_bit(
    settings: Callable, kill_and_resume: Callable, tmp_path: Path, changed: dict[str, object]
):
    asked = changed | {"model.dpo.sft_loss_weight": 0.1, "trainer.devices": 2}
    kill_and_resume(lambda name: settings(name, **asked), command=[DPO], step=8)
    assert_same_run(tmp_path / "killed", tmp_path / "whole", steps=STEPS)


def test_results_depend_neither_on_the_layout_nor_on_how_the_reference_is_kept(
    settings: Callable, run: Callable, tmp_path: Path
):
    same = {"trainer.dpo.max_epochs": 1, "model.hidden_dropout": 0.0, "model.dpo.label_smoothing": 0.1}
    swapped = {"model.dpo.log_prob_forward_micro_batch_size": 3}
    stored = {"model.dpo.store_reference": True}
    for name, changed in (
        ("swapped", swapped),
        ("stored", stored),
        ("TP2", LAYOUTS["TP2"]),
        (MIXED, LAYOUTS[MIXED] | stored),
    ):
        job = run(settings(name, **same, **changed), command=[DPO])
        assert job.process.returncode == 0, job.err[-3000:]
        # Batches of other widths round differently.
        bounds = {"rel": 1e-4, "abs": 1e-5} if name == "stored" else {"rel": 2e-4, "abs": 2e-5}
        for ours, theirs in zip(steps(tmp_path / name), steps(tmp_path / "swapped"), strict=True):
            assert ours == pytest.approx(theirs, **bounds), name
