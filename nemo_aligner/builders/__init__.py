# SPDX-License-Identifier: Apache-2.0
"""From settings to objects. The only package that may import everything; it builds and decides nothing else.

What only jobs that serve or are served need stands in ``actor`` and ``servers``, which import a server's libraries.
"""

from nemo_aligner.builders.loaders import reward_loaders, reward_objective, sft_loaders
from nemo_aligner.builders.models import (
    Pretrained,
    load_policy,
    load_reward_model,
    needed_tokenizer,
    standardize,
)
from nemo_aligner.builders.next_steps import say_next
from nemo_aligner.builders.resume import resume_point
from nemo_aligner.builders.runs import open_experiment, save_result, training_checkpoints, warn_of_schedule

__all__ = [
    "Pretrained",
    "load_policy",
    "load_reward_model",
    "needed_tokenizer",
    "open_experiment",
    "resume_point",
    "reward_loaders",
    "reward_objective",
    "save_result",
    "say_next",
    "sft_loaders",
    "standardize",
    "training_checkpoints",
    "warn_of_schedule",
]
