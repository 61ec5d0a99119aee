# SPDX-License-Identifier: Apache-2.0
"""Adapters of a job's model: made, loaded, and written as PEFT's folder."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from nemo_aligner.checkpoint.hf_config import family_for_export
from nemo_aligner.checkpoint.peft import PeftWeights, write_peft
from nemo_aligner.checkpoint.sharded import load_model, model_state, save_state
from nemo_aligner.checkpoint.weights import WeightReader
from nemo_aligner.config.base import ModelJob
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.heads import HEAD_NAME
from nemo_aligner.models.gpt.lora import add_adapters
from nemo_aligner.models.gpt.model import GPT, InterleavedGPT
from nemo_aligner.models.gpt.nf4 import NF4, quantize
from nemo_aligner.models.gpt.peft_config import SHARED_FOLDER_VARIABLE
from nemo_aligner.models.gpt.shared_weights import share_frozen
from nemo_aligner.parallel import collectives, world
from nemo_aligner.run.disk import report_if_full

logger = logging.getLogger(__name__)


def give_adapters(job: ModelJob, model: GPT | InterleavedGPT, config: dict[str, Any]) -> None:
    """Add to a loaded model the adapters that the settings ask for, if they do.

    Args:
        config: model_config.yaml of the model.

    Raises:
        UserError: the layout cuts keys and values, or the adapters to begin with do not fit.
    """
    lora, path = job.model.peft.lora, job.model.peft.restore_from_path
    if lora is None:
        return
    if job.model.peft.quantizes:
        quantize(model)
    add_adapters(model, lora, seed=job.model.seed)
    if path:
        load_model(model, PeftWeights(Path(path), config, lora), but=HEAD_NAME)
    folder = os.environ.get(SHARED_FOLDER_VARIABLE)
    shared = share_frozen(model, Path(folder)) if folder else None
    if world.is_logging_rank():
        logger.info("adapters: %.2f %% of this rank's weights are trained", 100 * _trained_share(model))
        if shared:
            total, found = (size / 2**20 for size in shared)
            logger.info("frozen weights: %.1f MiB, %.1f of them in memory for another job too", total, found)


def _trained_share(model: nn.Module) -> float:
    weights = list(model.parameters())
    packed = sum(2 * one.codes.numel() for one in model.modules() if isinstance(one, NF4))
    return sum(x.numel() for x in weights if x.requires_grad) / (sum(x.numel() for x in weights) + packed)


def save_adapters(job: ModelJob, model: GPT | InterleavedGPT, config: dict[str, Any], folder: Path) -> None:
    """Write a language model's adapters as PEFT reads them. Called by every rank.

    Args:
        config: model_config.yaml of the model.
        folder: where to; an earlier one of the same run is replaced.
    """
    lora = job.model.peft.lora
    assert lora is not None
    if config.get("reward_model_type"):
        if world.is_logging_rank():
            logger.info("no folder of adapters for PEFT: a reward model's head has no place there")
        return
    try:
        family_for_export(config)
    except UserError as error:
        if world.is_logging_rank():
            logger.warning(
                "no folder of adapters for PEFT, which knows Hugging Face's models: %s", error.problem
            )
        return
    weights = folder.with_name(f".saving-{folder.name}-weights")

    def write() -> None:
        write_peft(folder, WeightReader(weights), config, lora, base=str(job.pretrained[1]))
        shutil.rmtree(weights)
        onto = ", to be put onto the base in NF4" if job.model.peft.quantizes else ""
        logger.info("the adapters alone are in %s, as PEFT reads them%s", folder, onto)

    with report_if_full(folder.parent, folder.name):
        collectives.from_rank_0(lambda: shutil.rmtree(weights, ignore_errors=True))
        save_state(model_state(model), weights).result()
        world.barrier()
        collectives.from_rank_0(write)
