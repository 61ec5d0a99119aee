# SPDX-License-Identifier: Apache-2.0
"""Adapters, end to end: only they are saved and resumed, the result has them merged, and PEFT reads them."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nemo_aligner.checkpoint.convert import export_to_huggingface
from nemo_aligner.checkpoint.torch_dist import FolderReader
from tests.functional.conftest import Job
from tests.functional.ppo_pair import Pair
from tests.functional.run_folder import metrics
from tests.functional.test_dpo import DPO, STEPS, settings  # noqa: F401 - a fixture
from tests.functional.test_resume import assert_same_run

LORA = {
    "model.peft.peft_scheme": "lora",
    "model.peft.lora_tuning.target_modules": "[all]",
    "model.peft.lora_tuning.adapter_dim": 4,
    "model.optim.lr": 1e-2,
}


def stored(folder: Path) -> set[str]:
    return set(FolderReader(folder / "checkpoints/last/model_weights").tensors)


def test_dpo_is_killed_goes_on_and_leaves_adapters_that_peft_reads(
    settings: Callable,  # noqa: F811
    kill_and_resume: Callable,
    hf_folder: Path,
    tmp_path: Path,
):
    asked = LORA | {"trainer.devices": 2, "model.tensor_model_parallel_size": 2, "model.hidden_dropout": 0.0}
    asked |= {"model.peft.lora_tuning.adapter_dropout": 0.1}
    kill_and_resume(lambda name: settings(name, **asked), command=[DPO], step=8)
    assert_same_run(tmp_path / "killed", tmp_path / "whole", steps=STEPS)
    assert all(".adapters." in name for name in stored(tmp_path / "whole"))

    lines = [line for line in metrics(tmp_path / "whole") if "train/loss" in line]
    assert lines[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[-1]["train/acc"] == 1

    result = tmp_path / "whole/checkpoints/megatron_gpt.nemo"
    export_to_huggingface(result, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(hf_folder)
    tokens = torch.arange(3, 40)[None]
    before, after = base(tokens).logits, merged(tokens).logits
    assert (after - before).abs().max() > 1e-2
    other = peft.PeftModel.from_pretrained(base, result.with_name("megatron_gpt_peft"))
    torch.testing.assert_close(after, other(tokens).logits, rtol=0, atol=1e-4)


def test_adapters_to_begin_with_are_known_by_what_they_are(
    settings: Callable,  # noqa: F811
    run: Callable,
    tmp_path: Path,
):
    """Moved they are the same; trained further they are others, for the run and for its stored log-probs."""
    few = LORA | {"model.hidden_dropout": 0.0, "trainer.dpo.val_check_interval": 0}
    given, moved = tmp_path / "given", tmp_path / "moved"

    def dpo(name: str, *, code: int = 0, most: int = 1, **changed: object) -> Job:
        job = run(settings(name, **few, **{"trainer.dpo.max_steps": most}, **changed), command=[DPO])
        assert job.process.returncode == code, job.err[-3000:]
        return job

    dpo("first", **{"exp_manager.create_checkpoint_callback": False})
    made = tmp_path / "first/checkpoints/megatron_gpt_peft"
    params = "exp_manager.checkpoint_callback_params"
    best = {f"{params}.save_best_model": True, f"{params}.save_nemo_on_train_end": False}
    assert "its result is not overwritten" in dpo("first", code=2, **best).err
    made.rename(given)
    begun = {"model.peft.restore_from_path": given, "model.dpo.store_reference": True}
    dpo("run", **begun)
    given.rename(moved)
    again = dpo("run", most=2, **begun | {"model.peft.restore_from_path": moved})
    assert "are computed and kept" not in again.err
    tensors = load_file(moved / "adapter_model.safetensors")
    save_file({name: 2 * x for name, x in tensors.items()}, moved / "adapter_model.safetensors")
    changed = dpo("run", code=2, most=3, **begun | {"model.peft.restore_from_path": moved})
    assert f"with model.peft.restore_from_path={moved}, holds another model" in changed.err
    # Log-probs that another beginning has left are not this one's.
    shutil.rmtree(tmp_path / "run/checkpoints")
    dpo("run", **begun | {"model.peft.restore_from_path": moved})
    first = [line for line in metrics(tmp_path / "run") if "train/loss" in line][-1]
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    own = tmp_path / "run/checkpoints/megatron_gpt_peft"
    refused = dpo("run", code=2, most=2, **begun | {"model.peft.restore_from_path": own})
    assert "is where this run writes its adapters" in refused.err


def test_both_jobs_of_ppo(start: Callable, nemo: Path, reward_nemo: Path, tmp_path: Path):
    """The reference and the reward model are what the adapters and the head were at the beginning."""
    few = {"trainer.ppo.max_steps": 3, "trainer.ppo.save_interval": 2, "trainer.ppo.val_check_interval": 0}
    pair = Pair(
        folder=tmp_path / "pair",
        start=start,
        nemo=nemo,
        reward_nemo=reward_nemo,
        critic_settings=LORA,
        actor_settings=LORA | few,
    )
    pair.run()
    lines = [line for line in metrics(pair.actor_folder) if "train_optim/loss" in line]
    kls = [line["train_rollouts/init_policy_kl"] for line in lines]
    assert kls[0] == 0
    assert kls[-1] != 0
    assert max(line["train_rollouts/logprob_difference_max"] for line in lines) < 1e-4
    assert all(".adapters." in name for name in stored(pair.actor_folder))
    critic = {name for name in stored(pair.critic_folder) if ".adapters." not in name}
    assert critic == {"model.rm_head.weight", "model.rm_head.bias"}
    # A checkpoint of adapters is no model.
    alone = Pair(
        folder=tmp_path / "alone",
        start=start,
        nemo=pair.actor_folder / "checkpoints/last",
        reward_nemo=reward_nemo,
        actor_settings=few,
    )
    job = alone.start_actor()
    assert job.wait(timeout=60) == 2, job.err
    assert "it holds them alone, not" in job.err
