# SPDX-License-Identifier: Apache-2.0
"""What short runs of each kind gave when they were last looked at: tests/golden holds their metrics and weights.

Within 1e-5 here, for processors round differently. ``make golden`` compares bit for bit, on the machine that wrote
them with ``make golden GOLDEN=write``.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from nemo_aligner.launch.job_group import free_ports
from tests.functional.conftest import toy_config, write_toy_tokenizer
from tests.functional.ppo_pair import Pair
from tests.functional.run_folder import metrics, tensors

GPT = Path(__file__).parents[2] / "examples/nlp/gpt"
GOLDEN = Path(__file__).parents[1] / "golden"
MODE = os.environ.get("NEMO_ALIGNER_GOLDEN", "close")  # or "exact", or "write"
COLOURS = ("red", "green", "blue", "yellow")  # the earlier one is preferred


def digest(folder: Path) -> str:
    """Of the weights and the optimizer in the newest checkpoint."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors(folder).items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def of_run(folder: Path) -> dict[str, Any]:
    return {"metrics": metrics(folder), "weights": digest(folder)}


def check(name: str, found: Mapping[str, Any]) -> None:
    """Compare with what tests/golden has under ``name``, as ``MODE`` says."""
    path = GOLDEN / f"{name}.json"
    if MODE == "write":
        path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        return
    wanted = json.loads(path.read_text())
    if MODE == "exact":
        assert json.loads(json.dumps(found)) == wanted
        return
    assert found.keys() == wanted.keys()
    for job in found:
        ours, theirs = found[job], wanted[job]
        if isinstance(ours, list):
            assert [row["answer"] for row in ours] == [row["answer"] for row in theirs]
            logprobs = [row["logprob"] for row in theirs]
            assert [row["logprob"] for row in ours] == pytest.approx(logprobs, rel=1e-5, abs=1e-5)
            continue
        assert len(ours["metrics"]) == len(theirs["metrics"])
        for line, other in zip(ours["metrics"], theirs["metrics"], strict=True):
            assert line == pytest.approx(other, rel=1e-5, abs=1e-5), job


def test_sft(settings: dict[str, object], tmp_path: Path, run: Callable):
    job = run(
        settings
        | {
            "trainer.devices": 2,
            "model.hidden_dropout": 0.1,
            "model.attention_dropout": 0.1,
            "model.optim.lr": 1e-2,
            "model.optim.sched.warmup_steps": 2,
            "trainer.sft.max_epochs": 2,
            "trainer.sft.max_steps": 6,
            "trainer.sft.val_check_interval": 3,
            "trainer.sft.save_interval": 3,
        }
    )
    assert job.process.returncode == 0, job.err
    check("sft", {"run": of_run(tmp_path / "run")})


@pytest.mark.parametrize("kind", ["pairs", "regression"])
def test_reward_model(nemo: Path, tmp_path: Path, run: Callable, kind: str):
    rows: list[dict[str, object]] = []
    for index in range(32):
        better, worse = sorted(random.Random(index).sample(range(4), 2))
        for colour in (better, worse):
            text = f"User: thing {index}?\n\nAssistant: {COLOURS[colour]}"
            rows.append({"text": text} | ({"label": [4.0 - colour, -100]} if kind == "regression" else {}))
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    regression = {"model.reward_model_type": "regression", "model.regression.num_attributes": 2}
    job = run(
        {
            "pretrained_checkpoint.restore_from_path": nemo,
            "model.data.data_prefix": f"{{train: [{data}], validation: [{data}], test: [{data}]}}",
            "model.micro_batch_size": 4,
            "model.global_batch_size": 8,
            "model.optim.lr": 1e-3,
            "model.optim.sched.constant_steps": 0,
            "model.optim.sched.warmup_steps": 1,
            "trainer.precision": 32,
            "trainer.rm.max_epochs": 3,
            "trainer.rm.max_steps": 4,
            "trainer.rm.val_check_interval": 2,
            "trainer.rm.save_interval": 2,
            "exp_manager.explicit_log_dir": tmp_path / "run",
            "exp_manager.create_tensorboard_logger": False,
        }
        | (regression if kind == "regression" else {}),
        command=[GPT / "train_reward_model.py"],
    )
    assert job.process.returncode == 0, job.err
    check(f"reward_model_{kind}", {"run": of_run(tmp_path / "run")})


# {script: its block of the loop, a row of its data by number, more settings}
LOSSES: dict[str, tuple[str, Callable[[int], dict[str, object]], dict[str, object]]] = {
    "train_gpt_dpo": (
        "trainer.dpo",
        lambda i: {"prompt": f"thing {i}:", "chosen": f" {COLOURS[i % 3]}", "rejected": f" {COLOURS[3]}"},
        {"model.dpo.sft_loss_weight": 0.1},
    ),
    "train_gpt_kto": (
        "trainer.kto",
        lambda i: {"prompt": f"thing {i}:", "completion": f" {COLOURS[i % 4]}", "label": i % 4 < 2},
        {"model.peft.peft_scheme": "lora"},
    ),
    "train_gpt_grpo": (
        "trainer.ppo",
        lambda i: {"text": f"thing {i}:"},
        {"trainer.ppo.kl_placement": "loss"},
    ),
    "train_gpt_rs": ("trainer.ppo", lambda i: {"text": f"thing {i}:"}, {}),
    "train_gpt_online_dpo": (
        "trainer.ppo",
        lambda i: {"text": f"thing {i}:"},
        {"model.global_batch_size": 4, "model.micro_batch_size": 2},
    ),
    "train_gpt_on_policy_distillation": ("trainer.ppo", lambda i: {"text": f"thing {i}:"}, {}),
}
ROLLOUTS: dict[str, object] = {
    "trainer.ppo.rewards.rule.function": "rule.vowels",
    "trainer.ppo.mask_unfinished": False,
    "model.ppo.num_rollout_samples": 16,
    "model.ppo.num_responses_per_prompt": 4,
    "model.ppo.num_val_samples": 8,
    "model.ppo.rollout_micro_batch_size": 8,
    "model.ppo.length_params.max_length": 8,
}


@pytest.mark.parametrize("script", LOSSES)
def test_ten_steps(nemo: Path, tmp_path: Path, run: Callable, script: str):
    loop, row, more = LOSSES[script]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row(i)) + "\n" for i in range(40)))
    (tmp_path / "rule.py").write_text(
        "def vowels(*, response, **_): return sum(map(response.count, 'aeiou'))"
    )
    asked = {
        "pretrained_checkpoint.restore_from_path": nemo,
        "model.data.data_prefix": f"{{train: [{data}], validation: [{data}], test: [{data}]}}",
        "model.micro_batch_size": 4,
        "model.global_batch_size": 8,
        "model.optim.lr": 1e-4,
        "model.optim.sched.constant_steps": 0,
        "model.optim.sched.warmup_steps": 1,
        "trainer.precision": 32,
        f"{loop}.max_epochs": 9,
        f"{loop}.max_steps": 10,
        f"{loop}.val_check_interval": 5,
        f"{loop}.save_interval": 5,
        "exp_manager.explicit_log_dir": tmp_path / "run",
        "exp_manager.create_tensorboard_logger": False,
    }
    if script == "train_gpt_on_policy_distillation":
        more = {"model.on_policy_distillation.teacher": teacher(tmp_path)}
    job = run(asked | (ROLLOUTS if loop == "trainer.ppo" else {}) | more, command=[GPT / f"{script}.py"])
    assert job.process.returncode == 0, job.err
    check(script, {"run": of_run(tmp_path / "run")})


def teacher(folder: Path) -> Path:
    torch.manual_seed(5)
    path = folder / "teacher"
    LlamaForCausalLM(toy_config(num_hidden_layers=1, initializer_range=0.3)).save_pretrained(path)
    write_toy_tokenizer(path)
    return path


def test_self_play(settings: dict[str, object], tmp_path: Path, run: Callable):
    loop = {key.replace("sft", "spin"): value for key, value in settings.items() if "trainer.sft" in key}
    usual = {key: value for key, value in settings.items() if "trainer.sft" not in key}
    asked = {
        "model.spin.length_params.max_length": 8,
        "model.optim.lr": 1e-4,
        "trainer.spin.max_iterations": 3,
        "trainer.spin.max_steps": 10,
    }
    job = run(usual | loop | asked, command=[GPT / "train_gpt_spin.py"])
    assert job.process.returncode == 0, job.err
    check("train_gpt_spin", {"run": of_run(tmp_path / "run")})


def test_distillation(settings: dict[str, object], tmp_path: Path, run: Callable):
    asked = {
        "model.knowledge_distillation.teacher": teacher(tmp_path),
        "model.knowledge_distillation.top_k": 16,
        "model.optim.lr": 1e-3,
        "trainer.sft.max_epochs": 9,
        "trainer.sft.max_steps": 10,
    }
    job = run(settings | asked, command=[GPT / "train_gpt_knowledge_distillation.py"])
    assert job.process.returncode == 0, job.err
    check("train_gpt_knowledge_distillation", {"run": of_run(tmp_path / "run")})


@pytest.mark.parametrize("place", ["combined", "apart"])
def test_ppo(start: Callable, nemo: Path, reward_nemo: Path, tmp_path: Path, place: str):
    pair = Pair(folder=tmp_path / "pair", start=start, nemo=nemo, reward_nemo=reward_nemo)
    if place == "apart":
        port = free_ports(1)[0]
        pair.critic_settings = {"trainer.ppo.combine_rm_and_critic_server": False}
        pair.actor_settings = {
            "remote_critic_rm.combine_rm_and_critic_server": False,
            "remote_critic_rm.reward_model.port": port,
            "remote_critic_rm.reward_model.stop_at_end": True,
            "trainer.ppo.kl_estimator": "k3",
            "trainer.ppo.kl_placement": "last",
            "trainer.ppo.critic_warmup_steps": 1,
            "model.ppo.entropy_bonus": 0.01,
            "model.ppo.dual_clip": 3,
        }
        pair.serve_reward_model(port)
    pair.run()
    found = {"actor": of_run(pair.actor_folder), "critic": of_run(pair.critic_folder)}
    check(f"ppo_{place}", found)


def test_generation(nemo: Path, tmp_path: Path, run: Callable):
    found: dict[str, list[dict[str, Any]]] = {}
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"text": f"thing {i}{'!' * i}:"}) + "\n" for i in range(8)))
    for name, sampling in {
        "greedy": {"sampling.use_greedy": True},
        "drawn": {"sampling.top_p": 0.9, "sampling.temperature": 0.7, "sampling.repetition_penalty": 1.1},
    }.items():
        responses = tmp_path / f"{name}.jsonl"
        job = run(
            {
                "model.restore_from_path": nemo,
                "trainer.precision": 32,
                "input_file": asked,
                "output_file": responses,
                "sampling.max_length": 12,
                "batch_size": 3,
            }
            | sampling,
            command=[GPT / "generate.py"],
        )
        assert job.process.returncode == 0, job.err
        rows = [json.loads(line) for line in responses.read_text().splitlines()]
        found[name] = [{"answer": row["answer"], "logprob": row["logprob"]} for row in rows]
    check("generation", found)
