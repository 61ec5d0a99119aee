# SPDX-License-Identifier: Apache-2.0
"""Validation before the first step, and responses in a table: nothing of the training changes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_aligner.checkpoint.convert import export_to_huggingface
from tests.functional.conftest import COLOURS, LAYOUTS, MIXED
from tests.functional.run_folder import assert_same_learning, assert_same_tensors, metrics

MANY = {name: value for name, value in LAYOUTS[MIXED].items() if name != "model.micro_batch_size"}


def test_responses_stand_beside_what_was_expected(settings: dict[str, object], run: Callable, tmp_path: Path):
    learning = settings | {
        "model.optim.lr": 1e-2,
        "model.optim.sched.warmup_steps": 2,
        "trainer.sft.max_epochs": 8,
        "trainer.sft.max_steps": 24,
        "trainer.sft.val_check_interval": 12,
        "trainer.sft.val_before_train": True,
    }
    asked = {"trainer.sft.val_responses": 6, "trainer.sft.val_response_length": 9}
    for name, changed in {"plain": {}, "one": asked, "many": asked | MANY}.items():
        job = run(learning | changed | {"exp_manager.explicit_log_dir": tmp_path / name})
        assert job.process.returncode == 0, job.err[-3000:]
    assert_same_learning(tmp_path / "one", tmp_path / "plain")
    table = [json.loads(line) for line in (tmp_path / "one/table_validation.jsonl").open()]
    assert [(row["step"], row["prompt"]) for row in table] == [
        (step, f"thing {i}:") for step in (0, 12, 24) for i in range(6)
    ]
    assert [row["expected"] for row in table[:6]] == [f" {COLOURS[i % 4]}</s>" for i in range(6)]
    export_to_huggingface(tmp_path / "one/checkpoints/megatron_gpt_sft.nemo", tmp_path / "hf")
    model, tokenizer = (
        kind.from_pretrained(tmp_path / "hf") for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    for row in table[12:]:
        prompt = tokenizer(row["prompt"], return_tensors="pt").input_ids
        written = model.generate(prompt, max_new_tokens=9, do_sample=False)[0, prompt.shape[1] :]
        assert row["response"] == tokenizer.decode(written, skip_special_tokens=True)
    assert (tmp_path / "many/table_validation.jsonl").read_text() == (
        tmp_path / "one/table_validation.jsonl"
    ).read_text()
    job = run(settings | asked | {"model.data.validation_ds.file_path": "null"})
    assert job.process.returncode == 2
    assert "trainer.sft.val_responses=6 needs validation data" in job.err


def test_validation_before_the_first_step_is_of_the_model_as_it_came(
    settings: dict[str, object], run: Callable, hf_folder: Path, tmp_path: Path
):
    learning = settings | {"trainer.sft.max_steps": 4, "trainer.sft.val_check_interval": 2}
    for name, before in {"plain": False, "before": True}.items():
        folder = {"exp_manager.explicit_log_dir": tmp_path / name, "trainer.sft.val_before_train": before}
        assert run(learning | folder).wait() == 0
    assert_same_tensors(tmp_path / "before", tmp_path / "plain")
    (first, *rest), plain = metrics(tmp_path / "before"), metrics(tmp_path / "plain")
    assert rest == plain
    model, tokenizer = (kind.from_pretrained(hf_folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    losses: list[float] = []
    for i in range(32):
        prompt, whole = (
            tokenizer(text, return_tensors="pt").input_ids
            for text in (f"thing {i}:", f"thing {i}: {COLOURS[i % 4]}")
        )
        whole = torch.cat((whole, torch.tensor([[tokenizer.eos_token_id]])), dim=1)
        logprobs = model(whole).logits.double().log_softmax(-1)[0, :-1]
        losses += (-logprobs.gather(1, whole[0, 1:, None])[prompt.shape[1] - 1 :, 0]).tolist()
    assert (first["step"], first["validation/loss"]) == (
        0,
        pytest.approx(sum(losses) / len(losses), rel=1e-5),
    )
    refused = {"trainer.sft.val_before_train": True, "trainer.sft.val_check_interval": 0}
    job = run(settings | refused)
    assert job.wait() == 2
    assert "trainer.sft.val_before_train=True, and trainer.sft.val_check_interval=0" in job.err
