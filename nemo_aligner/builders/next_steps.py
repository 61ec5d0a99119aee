# SPDX-License-Identifier: Apache-2.0
"""The last lines of a training script: the commands that use its result, with the paths filled in."""

import logging
import shlex
from pathlib import Path

from nemo_aligner.config.base import TrainingJob
from nemo_aligner.config.reward import RMJob
from nemo_aligner.config.serve import CriticJob
from nemo_aligner.config.sft import TextJob
from nemo_aligner.parallel import world
from nemo_aligner.run.experiment import Experiment

logger = logging.getLogger(__name__)


def say_next(job: TrainingJob, run: Experiment) -> None:
    """Log what can be done with the run's .nemo, if it has written one."""
    if world.is_logging_rank() and run.nemo_path.exists():
        lines = [f"  {what}:\n    {command}" for what, command in _next(job, run.nemo_path).items()]
        logger.info("%s", "\n".join(["what can be done with the result:", *lines]))


def _next(job: TrainingJob, nemo: Path) -> dict[str, str]:
    """{what for: command}."""
    model = f"model={nemo}"
    found = {"have it for transformers": _command("export", model, f"out={nemo.with_suffix('')}_hf")}
    match job:
        case RMJob():
            found["serve rewards"] = _command("serve", model)
            found["have a fine-tuned model learn from it"] = _command(
                "ppo",
                f"reward_{model}",
                "model=SFT.nemo",
                "data=PROMPTS.jsonl",
                "validation=MORE_PROMPTS.jsonl",
            )
            return found
        case CriticJob():
            return found
        case TextJob():
            found["make a reward model of it"] = _command("rm", model, "data=PAIRS.jsonl", "validation=0.1")
    return {"ask it": _command("chat", model)} | found


def _command(*words: str) -> str:
    return shlex.join(["nemo-aligner", *words])
