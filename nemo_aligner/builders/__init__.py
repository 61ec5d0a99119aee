# SPDX-License-Identifier: Apache-2.0
"""From settings to objects. The only package that may import everything; it builds and decides nothing else.

What only jobs that serve or are served need stands in ``actor`` and ``servers``, which import a server's libraries.
"""

from nemo_aligner.builders.kept_references import renewed_reference
from nemo_aligner.builders.loaders import pair_loaders, reward_objective, sft_loaders
from nemo_aligner.builders.models import (
    Pretrained,
    load_policy,
    load_reward_model,
    require_tokenizer,
    standardize,
)
from nemo_aligner.builders.reference import with_kl_baseline, with_reference_logprobs, with_teacher
from nemo_aligner.builders.resume import resume_point
from nemo_aligner.builders.runs import (
    open_experiment,
    prepare_training,
    save_result,
    supervised_trainer,
    training_checkpoints,
)

__all__ = [
    "Pretrained",
    "load_policy",
    "load_reward_model",
    "open_experiment",
    "pair_loaders",
    "prepare_training",
    "renewed_reference",
    "require_tokenizer",
    "resume_point",
    "reward_objective",
    "save_result",
    "sft_loaders",
    "standardize",
    "supervised_trainer",
    "training_checkpoints",
    "with_kl_baseline",
    "with_reference_logprobs",
    "with_teacher",
]
