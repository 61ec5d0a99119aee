# SPDX-License-Identifier: Apache-2.0
"""Adapters, end to end: only they are saved and resumed, the result has them merged, and PEFT reads them."""

import math
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_aligner.checkpoint.convert import export_to_huggingface
from nemo_aligner.checkpoint.torch_dist import FolderReader
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
