# SPDX-License-Identifier: Apache-2.0
"""Alignment of large language models on Megatron-core. Importing the package has no side effects.

The names of :mod:`nemo_aligner.api` are the package's too; torch and Megatron are imported with the first of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_aligner.api import *  # noqa: F403

__version__ = "0.8.0"

API = {
    *(
        "BradleyTerry",
        "LanguageModel",
        "Metrics",
        "ModelOutput",
        "NLL",
        "Objective",
        "OptimConfig",
        "PreferenceBatch",
    ),
    *("RewardModel", "Rollout", "SamplingConfig", "SchedConfig", "TokenBatch", "Unit", "Wants"),
    *("load", "load_reward_model"),
}


def __getattr__(name: str) -> object:
    if name not in API:
        raise AttributeError(f"module 'nemo_aligner' has no attribute {name!r}")
    import_module("nemo_aligner.launch.amx").decide()  # read by torch once, when it is imported
    import_module("nemo_aligner.parallel.cpu_shim").import_megatron()
    return getattr(import_module("nemo_aligner.api"), name)
