# SPDX-License-Identifier: Apache-2.0
"""From settings to objects. The only package that may import everything; it builds and decides nothing else."""

from nemo_aligner.builders.actor import actor_prompts, actor_rollouts, load_actor, open_critic
from nemo_aligner.builders.loaders import reward_loaders, reward_objective, sft_loaders
from nemo_aligner.builders.models import (
    Pretrained,
    load_policy,
    load_reward_model,
    needed_tokenizer,
    standardize,
)
from nemo_aligner.builders.runs import (
    open_experiment,
    resume_point,
    save_result,
    training_checkpoints,
    warn_of_schedule,
)
from nemo_aligner.builders.servers import (
    critic_checkpoints,
    critic_config,
    critic_server,
    load_critic,
    load_served_reward_model,
    reward_server,
    reward_settings,
    served_limits,
)

__all__ = [
    "Pretrained",
    "actor_prompts",
    "actor_rollouts",
    "critic_checkpoints",
    "critic_config",
    "critic_server",
    "load_actor",
    "load_critic",
    "load_policy",
    "load_reward_model",
    "load_served_reward_model",
    "needed_tokenizer",
    "open_critic",
    "open_experiment",
    "resume_point",
    "reward_loaders",
    "reward_objective",
    "reward_server",
    "reward_settings",
    "save_result",
    "served_limits",
    "sft_loaders",
    "standardize",
    "training_checkpoints",
    "warn_of_schedule",
]
