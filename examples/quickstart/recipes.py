# SPDX-License-Identifier: Apache-2.0
"""The models and settings of `make quickstart`: one recipe for each start of the pipeline."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from examples.quickstart.stages import ROOT

__all__ = ["RECIPES", "Recipe"]

_ALWAYS = ("trainer.precision=32", "exp_manager.create_tensorboard_logger=False")
# A run of a minute is not resumed.
_NO_CHECKPOINTS = ("exp_manager.create_checkpoint_callback=False",)
_SHORT_SCHEDULE = ("model.optim.sched.constant_steps=0", "model.optim.sched.warmup_steps=10")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Data sizes and settings of every stage, beside the paths that the quick start fills in."""

    pretrained: Path | None  # a model in any form; None: a model with random weights is made and pretrained
    num_prose: int  # rows to pretrain on
    num_responses: int  # rows of supervised fine-tuning
    num_pairs: int  # preference pairs
    num_held_out: int  # validation rows of each stage, and questions that are asked before and after
    pretrain: tuple[str, ...]
    sft: tuple[str, ...]
    reward_model: tuple[str, ...]
    critic: tuple[str, ...]
    actor: tuple[str, ...]
    sampling: tuple[str, ...]  # of the responses before and after


_MAX_RESPONSE_TOKENS = 64
_PPO_STEPS = 40
_ROLLOUT = 128  # responses of a PPO step
_PPO_TOKENS = 96  # of prompt and response
_PPO_BATCH = 64  # responses of an optimizer step, in both jobs

VILLAGE = Recipe(
    pretrained=None,
    num_prose=8000,
    num_responses=3072,
    num_pairs=2048,
    num_held_out=128,
    pretrain=(
        *_ALWAYS,
        *_NO_CHECKPOINTS,
        *_SHORT_SCHEDULE,
        "trainer.devices=2",
        "trainer.sft.val_check_interval=1.0",
        "model.answer_only_loss=False",
        "model.encoder_seq_length=128",
        "model.data.train_ds.micro_batch_size=16",
        "model.data.train_ds.global_batch_size=32",
        "model.optim.lr=3e-3",
        "model.optim.sched.min_lr=1e-4",
    ),
    sft=(
        *_ALWAYS,
        *_NO_CHECKPOINTS,
        *_SHORT_SCHEDULE,
        "trainer.devices=2",
        "trainer.sft.max_epochs=2",
        "trainer.sft.val_check_interval=1.0",
        "model.encoder_seq_length=128",
        "model.data.train_ds.micro_batch_size=16",
        "model.data.train_ds.global_batch_size=32",
        "model.optim.lr=1e-3",
        "model.optim.sched.min_lr=1e-4",
    ),
    reward_model=(
        *_ALWAYS,
        *_NO_CHECKPOINTS,
        *_SHORT_SCHEDULE,
        "trainer.devices=2",
        "trainer.rm.val_check_interval=16",
        "model.encoder_seq_length=128",
        "model.data.append_eod=True",
        "model.micro_batch_size=16",
        "model.global_batch_size=32",
        "model.optim.lr=5e-4",
        "model.optim.sched.min_lr=5e-5",
    ),
    critic=(
        *_ALWAYS,
        *_SHORT_SCHEDULE,
        "trainer.devices=1",
        f"trainer.ppo.max_steps={_PPO_STEPS * _ROLLOUT // _PPO_BATCH}",
        "trainer.ppo.inference_micro_batch_size=32",
        f"model.encoder_seq_length={_PPO_TOKENS}",
        "model.micro_batch_size=32",
        f"model.global_batch_size={_PPO_BATCH}",
        "model.optim.lr=5e-4",
        "model.optim.sched.min_lr=1e-4",
    ),
    actor=(
        *_ALWAYS,
        *_SHORT_SCHEDULE,
        "trainer.devices=1",
        f"trainer.ppo.max_steps={_PPO_STEPS}",
        "trainer.ppo.max_epochs=10",
        "trainer.ppo.val_check_interval=10",
        "trainer.ppo.save_interval=0",
        "trainer.ppo.initial_policy_kl_penalty=0.2",
        # |log p - log p0| is least where there is nothing to choose: with a constant reward it alone moves the policy.
        "trainer.ppo.use_absolute_kl=False",
        f"model.encoder_seq_length={_PPO_TOKENS}",
        "model.micro_batch_size=32",
        f"model.global_batch_size={_PPO_BATCH}",
        f"model.ppo.num_rollout_samples={_ROLLOUT}",
        "model.ppo.rollout_micro_batch_size=64",
        "model.ppo.num_val_samples=128",
        f"model.ppo.length_params.max_length={_MAX_RESPONSE_TOKENS}",
        "model.ppo.sampling_params.end_strings=[]",
        "model.optim.lr=1e-4",
        "model.optim.sched.min_lr=3e-5",
        f"remote_critic_rm.pad_to_length={_PPO_TOKENS}",
    ),
    sampling=("trainer.precision=32", f"sampling.max_length={_MAX_RESPONSE_TOKENS}", "sampling.seed=7"),
)


def _but(settings: tuple[str, ...], changed: Mapping[str, str | int | float]) -> tuple[str, ...]:
    """The same settings with other values."""
    there = dict(setting.split("=", 1) for setting in settings)
    assert there.keys() >= changed.keys(), changed.keys() - there.keys()
    return tuple(f"{key}={changed.get(key, value)}" for key, value in there.items())


_LARGE_PPO_TOKENS = 80
_LARGE_ROLLOUT = 16
_LARGE_BATCH = 8

# A hundred times the weights: fewer rows, smaller steps.
SMOLLM2 = Recipe(
    pretrained=ROOT / ".cache/SmolLM2-135M-Instruct.Q4_1.gguf",
    num_prose=0,
    num_responses=384,
    num_pairs=256,
    num_held_out=64,
    pretrain=(),
    sft=_but(
        VILLAGE.sft,
        {
            "trainer.sft.max_epochs": 1,
            "model.data.train_ds.micro_batch_size": 8,
            "model.data.train_ds.global_batch_size": 16,
            "model.optim.lr": "1e-4",
            "model.optim.sched.min_lr": "1e-5",
            "model.optim.sched.warmup_steps": 4,
        },
    ),
    reward_model=_but(
        VILLAGE.reward_model,
        {
            "trainer.rm.val_check_interval": 8,
            "model.micro_batch_size": 4,
            "model.global_batch_size": 16,
            "model.optim.lr": "5e-5",
            "model.optim.sched.min_lr": "1e-5",
            "model.optim.sched.warmup_steps": 4,
        },
    ),
    critic=_but(
        VILLAGE.critic,
        {
            "trainer.ppo.max_steps": _PPO_STEPS * _LARGE_ROLLOUT // _LARGE_BATCH,
            "trainer.ppo.inference_micro_batch_size": _LARGE_BATCH,
            "model.encoder_seq_length": _LARGE_PPO_TOKENS,
            "model.micro_batch_size": _LARGE_BATCH,
            "model.global_batch_size": _LARGE_BATCH,
            "model.optim.lr": "5e-5",
            "model.optim.sched.min_lr": "1e-5",
        },
    ),
    actor=_but(
        VILLAGE.actor,
        {
            "trainer.ppo.val_check_interval": 20,
            "trainer.ppo.initial_policy_kl_penalty": 0.05,
            "model.encoder_seq_length": _LARGE_PPO_TOKENS,
            "model.micro_batch_size": _LARGE_BATCH,
            "model.global_batch_size": _LARGE_BATCH,
            "model.ppo.num_rollout_samples": _LARGE_ROLLOUT,
            "model.ppo.rollout_micro_batch_size": _LARGE_ROLLOUT,
            "model.ppo.num_val_samples": _LARGE_ROLLOUT,
            "model.ppo.length_params.max_length": 56,
            "model.optim.lr": "3e-5",
            "model.optim.sched.min_lr": "1e-5",
            "remote_critic_rm.pad_to_length": _LARGE_PPO_TOKENS,
        },
    ),
    sampling=_but(VILLAGE.sampling, {"sampling.max_length": 56}),
)

RECIPES = {"village": VILLAGE, "smollm2": SMOLLM2}
