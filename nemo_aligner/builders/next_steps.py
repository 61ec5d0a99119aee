# SPDX-License-Identifier: Apache-2.0
"""What a training script says last: the commands that go on from its result, with the paths filled in."""

import logging
import shlex
import sys
from pathlib import Path

from nemo_aligner.config.base import Job
from nemo_aligner.config.ppo import ActorJob
from nemo_aligner.config.reward import RMJob
from nemo_aligner.config.sft import SFTJob
from nemo_aligner.parallel import world
from nemo_aligner.run.experiment import Experiment

logger = logging.getLogger(__name__)


def say_next(job: Job, run: Experiment) -> None:
    """Log what can be done with the run's .nemo, if it has written one."""
    if world.is_logging_rank() and run.nemo_path.exists():
        lines = [f"  {what}:\n    {command}" for what, command in _next(job, run.nemo_path).items()]
        logger.info("%s", "\n".join(["what can be done with the result:", *lines]))


def _next(job: Job, nemo: Path) -> dict[str, str]:
    """{what for: command}."""
    found = {}
    if isinstance(job, SFTJob | ActorJob):
        found["ask it"] = _command("generate.py", f"model.restore_from_path={nemo}")
    if isinstance(job, RMJob):
        found["serve rewards"] = _command("serve_reward_model.py", f"rm_model_file={nemo}")
    found["have it for transformers"] = _command(
        "export_hf.py", "--in-file", str(nemo), "--out-file", f"{nemo.with_suffix('')}_hf"
    )
    match job:
        case SFTJob():
            found["make a reward model of it"] = _command(
                "train_reward_model.py",
                f"pretrained_checkpoint.restore_from_path={nemo}",
                "model.data.data_prefix={train: [PAIRS.jsonl], validation: [MORE_PAIRS.jsonl]}",
            )
        case RMJob():
            found["have a fine-tuned model learn from it"] = _command(
                "run_ppo.py",
                f"critic.pretrained_checkpoint.restore_from_path={nemo}",
                "actor.pretrained_checkpoint.restore_from_path=SFT.nemo",
                "actor.model.data.data_prefix={train: [PROMPTS.jsonl], validation: [MORE_PROMPTS.jsonl]}",
            )
    return found


def _command(script: str, *words: str) -> str:
    path = Path(sys.argv[0]).resolve().parent / script
    return shlex.join(
        ["python", str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path), *words]
    )
