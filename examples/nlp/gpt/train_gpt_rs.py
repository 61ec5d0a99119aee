# SPDX-License-Identifier: Apache-2.0
"""Rejection sampling: a language model learns from the best of its own responses, as from texts of a data set.

python examples/nlp/gpt/train_gpt_rs.py pretrained_checkpoint.restore_from_path=sft.nemo \
    "model.data.data_prefix={train: [prompts.jsonl]}" trainer.ppo.rewards.rule.function=my_rewards.score
"""

from dataclasses import dataclass, field

from nemo_aligner.config import ppo
from nemo_aligner.launch.script import script
from nemo_aligner.objectives.config import RewardEstimator


@dataclass(frozen=True, kw_only=True)
class RSConfig(ppo.ActorConfig):
    """The loss of the first update is the negative log-likelihood of the responses that are kept."""

    advantage_estimator: RewardEstimator = "best_of_n"
    initial_policy_kl_penalty: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RSTrainerConfig(ppo.ActorTrainerConfig):
    ppo: RSConfig = field(default_factory=RSConfig)


@dataclass(frozen=True, kw_only=True)
class RSRolloutConfig(ppo.ActorRolloutConfig):
    """Four responses to a prompt, and one update to a rollout."""

    num_rollout_samples: int = 64
    num_responses_per_prompt: int = 4


@dataclass(frozen=True, kw_only=True)
class RSModelConfig(ppo.ActorModelConfig):
    ppo: RSRolloutConfig = field(default_factory=RSRolloutConfig)


@dataclass(frozen=True, kw_only=True)
class RSJob(ppo.CriticFreeJob):
    model: RSModelConfig
    trainer: RSTrainerConfig = field(default_factory=RSTrainerConfig)
    name: str = "megatron_gpt_rs"


@script("gpt_rs", RSJob)
def main(job: RSJob) -> None:
    """Have a language model learn from the best of its own responses."""
    from nemo_aligner.builders.actor import train_actor

    train_actor(job)


if __name__ == "__main__":
    main()
