# SPDX-License-Identifier: Apache-2.0
"""The command lines of NeMo-Aligner's PPO tutorial for two terminals, every key as printed, at toy size.

Changed are paths and ``trainer.devices``; what comes after each line makes a toy run of it.
"""

import json
from collections.abc import Callable
from pathlib import Path

from nemo_aligner.launch.job_group import free_ports
from tests.functional.ppo_pair import ACTOR, CRITIC, LONG

PRINTED_CRITIC = """
    trainer.devices=1
    trainer.num_nodes=8
    ++model.tensor_model_parallel_size=1
    ++model.pipeline_model_parallel_size=1
    exp_manager.create_wandb_logger=False
    exp_manager.wandb_logger_kwargs.name=critic_training
    exp_manager.wandb_logger_kwargs.project=nemo_aligner_ppo
    exp_manager.explicit_log_dir={results}
    trainer.ppo.inference_micro_batch_size=4
    ++pretrained_checkpoint.restore_from_path={model}
    ++model.megatron_amp_O2=True
    ++model.activations_checkpoint_granularity=null
    ++trainer.ppo.combine_rm_and_critic_server=True
    ++model.offload_adam_states=True
    ++model.mcore_gpt=True
"""
PRINTED_ACTOR = """
    ++model.data.data_impl=jsonl
    pretrained_checkpoint.restore_from_path={model}
    trainer.num_nodes=1
    trainer.devices=2
    ++model.pipeline_model_parallel_size=1
    ++model.tensor_model_parallel_size=1
    ++model.ppo.combine_rm_and_critic_server=True
    ++model.ppo.offload_adam_states=True
    ++model.megatron_amp_O2=True
    ++trainer.ppo.normalize_advantages=True
    ++model.mcore_gpt=True
    exp_manager.create_wandb_logger=False
    exp_manager.wandb_logger_kwargs.name=ppo_actor_training
    exp_manager.wandb_logger_kwargs.project=nemo_aligner_ppo
    exp_manager.explicit_log_dir={results}
    ++model.ppo.entropy_bonus=0.0
    remote_critic_rm.pad_to_length=2048
"""


def critic_words(reward_nemo: Path, results: Path) -> list[str]:
    return PRINTED_CRITIC.format(model=reward_nemo, results=results).split()


def test_eight_nodes_need_a_starter(run: Callable, reward_nemo: Path, tmp_path: Path):
    job = run(critic_words(reward_nemo, tmp_path / "critic"), command=[CRITIC])
    assert job.wait() == 2
    problem, fix = job.err.splitlines()
    assert problem == "error: trainer.num_nodes=8, but this machine can start its own ranks only"
    assert "with srun or torchrun" in fix
    assert fix.endswith("trainer.num_nodes=1 trainer.devices=8")


def test_two_terminals(
    start: Callable, nemo: Path, reward_nemo: Path, prompts: Path, short_tmp: Path, tmp_path: Path
):
    port, tmp = free_ports(1)[0], {"TMPDIR": str(short_tmp)}
    critic = start(
        [
            *critic_words(reward_nemo, tmp_path / "critic"),
            *("trainer.num_nodes=1", "trainer.devices=2"),
            f"trainer.ppo.port={port}",
        ],
        command=[CRITIC],
        env=tmp,
    )
    actor = start(
        [
            f"++model.data.data_prefix={{train: [{prompts}], validation: [{prompts}], test: [{prompts}]}}",
            *PRINTED_ACTOR.format(model=nemo, results=tmp_path / "actor").split(),
            *("model.ppo.num_rollout_samples=64", "model.ppo.length_params.max_length=8"),
            *("trainer.ppo.max_steps=2", "trainer.ppo.val_check_interval=2"),
            f"remote_critic_rm.critic.port={port}",
        ],
        command=[ACTOR],
        env=tmp,
    )
    assert actor.wait(timeout=LONG) == 0, actor.err[-3000:] + critic.err[-3000:]
    assert critic.wait(timeout=60) == 0, critic.err[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "actor/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train_rollouts/rewards" in line] == [1, 2]
    assert (tmp_path / "actor/checkpoints/megatron_gpt_ppo_actor.nemo").is_file()
    assert (tmp_path / "critic/checkpoints/megatron_gpt_critic.nemo").is_file()
    for job in (critic, actor):
        assert "2 rank(s) started by local" in job.err
        assert "not yet in effect" not in job.err
