# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint and the settings to a model on this layout, and back."""

import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from nemo_aligner.builders.adapters import give_adapters
from nemo_aligner.checkpoint.model_nemo import save_nemo, shared_model
from nemo_aligner.checkpoint.nemo_archive import CONFIG_NAME, WEIGHTS_NAME, ModelArchive
from nemo_aligner.checkpoint.open_model import OpenedModel
from nemo_aligner.checkpoint.peft import refuse_adapters
from nemo_aligner.checkpoint.sharded import load_model
from nemo_aligner.checkpoint.stop_tokens import stop_ids
from nemo_aligner.checkpoint.tokenizer_files import CHAT_DATE, load_archived_tokenizer
from nemo_aligner.checkpoint.trainer_state import Checkpoint
from nemo_aligner.checkpoint.training import TRAINING_NAMES
from nemo_aligner.config.base import ModelConfig, ModelJob
from nemo_aligner.config.reward import RMJob
from nemo_aligner.data.reading import Reading
from nemo_aligner.data.tokenizer import Tokenizer, check_fits
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.config import GPTConfig, precision_name, unread_keys
from nemo_aligner.models.gpt.critic import GPTCritic
from nemo_aligner.models.gpt.heads import HEAD_KEYS, HEAD_NAME, HeadConfig, draw_head, head_config
from nemo_aligner.models.gpt.learner import GPTLearner
from nemo_aligner.models.gpt.model import GPT, InterleavedGPT, build_gpt
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.models.gpt.recompute import Recompute
from nemo_aligner.models.gpt.transformer import dtype_of
from nemo_aligner.parallel import collectives, world
from nemo_aligner.run.progress import heartbeat

logger = logging.getLogger(__name__)


L = TypeVar("L", bound=GPTLearner)


@dataclass(frozen=True, kw_only=True)
class Pretrained(Generic[L]):
    """A checkpoint, loaded onto this layout, and what is needed to write it again."""

    learner: L
    tokenizer: Tokenizer | None
    config: dict[str, Any]  # model_config.yaml as it is to be saved
    files: dict[str, Path | bytes]  # tokenizer files, by their names within the archive

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """Write the model as it is now. Called by every rank."""
        save_nemo(self.learner.model, path, config=self.config, files=self.files, overwrite=overwrite)


@world.phase("loading the model")
def load_policy(job: ModelJob, *, start: Checkpoint | None = None) -> Pretrained[GPTPolicy]:
    """The language model that the job starts from, or goes on with from ``start``, its tokenizer and its config.

    Raises:
        UserError: the checkpoint is not there, damaged, or does not fit the layout or the overrides.
    """
    with open_checkpoint(job, start) as archive:
        config = merged_config(job.model, archive)
        _refuse_reward_model(*job.pretrained, config)
        built, tokenizer, files = build_model(job, archive, config, head=None)
    _load_adapters(job, built, start)
    pin_clock(tokenizer, config)
    policy = GPTPolicy(
        built,
        end_ids=stop_ids(config, tokenizer),
        detokenizer=tokenizer,
        kept_logits_bytes=job.model.kept_logits_mib << 20,
        seed=job.model.seed,
    )
    return Pretrained(learner=policy, tokenizer=tokenizer, config=config, files=files)


@world.phase("loading another model")
def load_frozen_policy(
    job: ModelJob,
    setting: str,
    path: str,
    *,
    check: Callable[[GPTConfig, Tokenizer | None], None],
    end_ids: Sequence[int],
    known_ids: int | None = None,
) -> GPTPolicy:
    """Another language model, on the job's layout and in its precision, and never trained.

    Args:
        job: of the model that is trained.
        setting: names the other model in messages.
        path: whatever a job may start from.
        check: raises UserError for a model that does not fit, before its weights are loaded.
        end_ids: the tokens that end a response.
        known_ids: the most likely tokens of a place are sought below this one; None: all of the model's.

    Raises:
        UserError: the checkpoint is not there, damaged, does not fit the layout, or is no language model.
    """
    with shared_model(path) as archive:
        refuse_adapters(archive)
        _refuse_reward_model(setting, path, archive.config)
        gpt = GPTConfig.from_dict(archive.config)
        tokenizer = load_archived_tokenizer(archive)
        check(gpt, tokenizer)
        model = _load(job, archive, gpt, dtype_of(chosen_precision(job)), head=None, trained=False)
        return GPTPolicy(model, end_ids=end_ids, detokenizer=tokenizer, known_ids=known_ids)


def _refuse_reward_model(setting: str, path: str, config: dict[str, Any]) -> None:
    if config.get("reward_model_type"):
        raise UserError(f"{setting}={path} is a reward model and writes no text", fix="give a language model")


@world.phase("loading the model")
def go_on_from(pretrained: Pretrained[GPTPolicy], start: Checkpoint | None) -> None:
    """Give a model that was loaded as its run began the weights of ``start``, where there is one."""
    if start is not None:
        _load_weights(pretrained.learner.model, start)


def _load_weights(model: GPT | InterleavedGPT, start: Checkpoint) -> None:
    """Load the weights of ``start``: adapters and a head where the model has adapters, else all."""
    with heartbeat("loading weights", enabled=world.is_logging_rank()):
        load_model(model, start.path / WEIGHTS_NAME)


def _load_adapters(job: ModelJob, model: GPT | InterleavedGPT, start: Checkpoint | None) -> None:
    """Load the adapters of ``start`` onto the base model, if the run trains adapters."""
    if job.model.peft.lora and start is not None:
        _load_weights(model, start)


@world.phase("loading the model")
def load_reward_model(job: RMJob, *, start: Checkpoint | None = None) -> Pretrained[GPTCritic]:
    """A reward model: of a language model with a new head, or one that is gone on with.

    Raises:
        UserError: the checkpoint is not there, damaged, or does not fit the layout or the overrides.
    """
    with open_checkpoint(job, start) as archive:
        config = merged_config(job.model, archive)
        head = head_config(config)
        assert head is not None
        own = (start is not None and not job.model.peft.lora) or (
            head_config(archive.config) == head
            and (job.model.reward_model_type == "binary_ranking" or job.model.regression.load_rm_head_weights)
        )
        trained, asked = Reading.of(archive.config), Reading.of(config)
        if own and trained not in (None, asked) and world.is_logging_rank():
            logger.warning(
                "model.data has texts read with %s, and this reward model was trained with %s", asked, trained
            )
        built, tokenizer, files = build_model(job, archive, config, head=head, but=None if own else HEAD_NAME)
        if not own:
            draw_head(built, seed=job.model.seed)
    _load_adapters(job, built, start)
    pin_clock(tokenizer, config)
    critic = GPTCritic(built, head=head, seed=job.model.seed)
    return Pretrained(learner=critic, tokenizer=tokenizer, config=config, files=files)


def open_checkpoint(
    job: ModelJob, start: Checkpoint | None
) -> contextlib.AbstractContextManager[OpenedModel]:
    """The checkpoint that the job starts from, or goes on with; beside adapters their base."""
    if start is None or job.model.peft.lora:
        return shared_model(job.pretrained[1])
    return shared_model(start.path, check=False)  # its files have been checked


def merged_config(model: ModelConfig, archive: ModelArchive) -> dict[str, Any]:
    """model_config.yaml as it is to be saved: the checkpoint's with the settings' own.

    Raises:
        UserError: the checkpoint holds adapters alone.
    """
    refuse_adapters(archive)
    unread = [key for key in unread_keys(archive.config) if key not in HEAD_KEYS]
    if unread and world.is_logging_rank():
        logger.info("keys of model_config.yaml that are kept and not read: %s", ", ".join(unread))
    return {**archive.config, **model.architecture, **model.saved_keys}


def build_model(
    job: ModelJob,
    archive: OpenedModel,
    config: dict[str, Any],
    *,
    head: HeadConfig | None,
    but: str | None = None,
) -> tuple[GPT | InterleavedGPT, Tokenizer | None, dict[str, Path | bytes]]:
    """The model that ``config`` describes with the archive's weights, its tokenizer, if it has one, and their files.

    ``config`` gets the precision. See :func:`load_model` for ``but``.
    """
    gpt, precision = GPTConfig.from_dict(config), _precision(job)
    built = _load(job, archive, gpt, dtype_of(precision), head=head, trained=True, but=but)
    config["precision"] = precision
    give_adapters(job, built, config)
    tokenizer = load_archived_tokenizer(archive)
    if tokenizer is not None:
        check_fits(tokenizer, gpt.vocab_size)
    return built, tokenizer, _tokenizer_files(archive)


def _load(
    job: ModelJob,
    archive: OpenedModel,
    gpt: GPTConfig,
    dtype: torch.dtype,
    *,
    head: HeadConfig | None,
    trained: bool,
    but: str | None = None,
) -> GPT | InterleavedGPT:
    built = build_gpt(
        gpt,
        job.model.layout,
        dtype,
        use_flash_attention=job.model.use_flash_attention,
        recompute=job.model.recompute if trained else Recompute(),
        head=head,
        adapted=trained and job.model.peft.lora is not None,
    )
    with heartbeat("loading weights", enabled=world.is_logging_rank()):
        load_model(built, archive.weights, but=but)
    return built


def chosen_precision(job: ModelJob) -> str:
    """``trainer.precision`` as 32, bf16 or 16; by the device where it is not set."""
    by_device = "32" if world.device().type == "cpu" else "bf16"
    return precision_name(by_device if job.trainer.chooses_precision else job.trainer.precision or "")


def _precision(job: ModelJob) -> str:
    """See :func:`chosen_precision`; a choice that people may not expect is logged."""
    asked, precision = job.trainer.precision, chosen_precision(job)
    if world.device().type == "cpu" and world.is_logging_rank():
        if job.trainer.chooses_precision:
            logger.info("trainer.precision=32, as there is no GPU")
        elif precision != "32":
            logger.info("trainer.precision=%s on a CPU: without AMX, 32 is two to three times as fast", asked)
    return precision


def pin_clock(tokenizer: Tokenizer | None, config: dict[str, Any], day: str | None = None) -> None:
    """Fix the day that a chat template which reads the clock sees, and have it saved with the model.

    Args:
        tokenizer: the model's.
        config: model_config.yaml as it is to be saved; its tokenizer section is replaced.
        day: YYYY-MM-DD; None: the day that the model was trained on so far, else today.
    """
    if tokenizer is None or not tokenizer.reads_clock:
        return
    section = config["tokenizer"]
    today = collectives.broadcast_object(date.today().isoformat())
    chosen = day or str(section.get(CHAT_DATE) or today)
    tokenizer.pin_clock(date.fromisoformat(chosen))
    config["tokenizer"] = {**section, CHAT_DATE: chosen}


def _tokenizer_files(archive: ModelArchive) -> dict[str, Path | bytes]:
    """All files of the archive but config, weights and training state, read while the archive is open."""
    names = {path: path.relative_to(archive.folder) for path in sorted(archive.folder.rglob("*"))}
    return {
        name.as_posix(): path.read_bytes()
        for path, name in names.items()
        if path.is_file() and name.parts[0] not in (CONFIG_NAME, WEIGHTS_NAME, *TRAINING_NAMES)
    }


def require_tokenizer(job: ModelJob, pretrained: Pretrained[Any]) -> Tokenizer:
    """The checkpoint's tokenizer.

    Raises:
        UserError: it has none.
    """
    if pretrained.tokenizer is None:
        key, path = job.pretrained
        raise UserError(
            f"{key}={path} holds no tokenizer, and text needs one",
            fix="give a model with its tokenizer: a whole Hugging Face folder, or a .nemo made of one",
        )
    return pretrained.tokenizer


def standardize(job: RMJob, pretrained: Pretrained[GPTCritic], validation: dict[str, float]) -> None:
    """Have the saved model serve rewards of mean 0 and deviation 1, where that is asked for.

    Args:
        validation: the last validation's means, of which the rewards' are taken where the settings give none.

    Raises:
        UserError: the rewards have no mean, or do not differ.
    """
    asked = job.model.reward_standardization
    if not asked.enable:
        return
    mean = validation["validation/rewards_all_mean"] if asked.mean is None else asked.mean
    std = validation["validation/rewards_all_std"] if asked.std is None else asked.std
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise UserError(
            f"rewards of mean {mean:g} and deviation {std:g} cannot be standardised",
            fix="set model.reward_standardization.mean and .std, or model.reward_standardization.enable=False",
        )
    pretrained.config["reward_standardization"] = {"enable": True, "mean": mean, "std": std}
    if world.is_logging_rank():
        logger.info("rewards will be served as (reward - %.4f) / %.4f", mean, std)
