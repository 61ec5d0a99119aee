# SPDX-License-Identifier: Apache-2.0
"""Group Relative Policy Optimization: a language model learns from rewards by Python functions, without a critic.

python examples/nlp/gpt/train_gpt_grpo.py pretrained_checkpoint.restore_from_path=sft.nemo \
    "model.data.data_prefix={train: [prompts.jsonl]}" trainer.ppo.rewards.rule.function=my_rewards.score
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from nemo_aligner.config import ppo
from nemo_aligner.launch.script import script
from nemo_aligner.models.gpt.learning_rate import OptimConfig, SchedConfig
from nemo_aligner.objectives.config import RewardEstimator


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(ppo.ActorConfig):
    """Advantages within a group, and the KL in the loss by k3 (Shao 2024, arXiv 2402.03300, eq. 3)."""

    advantage_estimator: RewardEstimator = "group"
    initial_policy_kl_penalty: float = 0.001
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_placement: Literal["token", "last", "loss"] = "loss"
    mask_unfinished: bool = False


@dataclass(frozen=True, kw_only=True)
class GRPOTrainerConfig(ppo.ActorTrainerConfig):
    ppo: GRPOConfig = field(default_factory=GRPOConfig)


@dataclass(frozen=True, kw_only=True)
class GRPORolloutConfig(ppo.ActorRolloutConfig):
    """Eight responses to a prompt; clip-higher's 0.28 is DAPO's (Yu 2025, arXiv 2503.14476)."""

    num_rollout_samples: int = 64
    num_responses_per_prompt: int = 8
    rollout_micro_batch_size: int = 32
    ratio_eps_high: float | None = 0.28


@dataclass(frozen=True, kw_only=True)
class GRPOModelConfig(ppo.ActorModelConfig):
    ppo: GRPORolloutConfig = field(default_factory=GRPORolloutConfig)
    optim: OptimConfig = field(
        default_factory=partial(OptimConfig, lr=1e-6, weight_decay=0.1, sched=SchedConfig(name="constant"))
    )


@dataclass(frozen=True, kw_only=True)
class GRPOJob(ppo.CriticFreeJob):
    model: GRPOModelConfig
    trainer: GRPOTrainerConfig = field(default_factory=GRPOTrainerConfig)
    name: str = "megatron_gpt_grpo"


@script("gpt_grpo", GRPOJob)
def main(job: GRPOJob) -> None:
    """Have a language model write what the reward functions reward."""
    from nemo_aligner.builders.actor import train_actor

    train_actor(job)


if __name__ == "__main__":
    main()
