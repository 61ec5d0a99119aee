# SPDX-License-Identifier: Apache-2.0
"""From settings to objects. The only module that may import everything; it builds and decides nothing else."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from nemo_aligner.batch import TokenBatch
from nemo_aligner.checkpoint.model_nemo import save_nemo, shared_nemo
from nemo_aligner.checkpoint.nemo_archive import CONFIG_NAME, WEIGHTS_NAME, NemoArchive
from nemo_aligner.checkpoint.sharded import load_model
from nemo_aligner.checkpoint.tokenizer_files import load_archived_tokenizer
from nemo_aligner.checkpoint.training import (
    TRAINING_NAMES,
    Checkpoint,
    TrainingCheckpoints,
    find_checkpoints,
    read_checkpoint,
    remove_unfinished,
)
from nemo_aligner.config import Job, ModelConfig, RMJob, SFTJob, SFTModelConfig
from nemo_aligner.data.collate import collate, empty_sample
from nemo_aligner.data.config import SFTDataConfig, SFTSplitConfig
from nemo_aligner.data.datasets import describe, open_sft
from nemo_aligner.data.loader import BatchLoader
from nemo_aligner.data.sample import Sample
from nemo_aligner.data.sampler import GlobalBatchSampler
from nemo_aligner.data.tokenizer import Tokenizer, check_fits
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.config import GPTConfig, unread_keys
from nemo_aligner.models.gpt.critic import GPTCritic
from nemo_aligner.models.gpt.heads import HEAD_NAME, HeadConfig, draw_head, head_config
from nemo_aligner.models.gpt.learner import GPTLearner
from nemo_aligner.models.gpt.learning_rate import OptimConfig
from nemo_aligner.models.gpt.model import GPT, InterleavedGPT, build_gpt
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.models.gpt.transformer import dtype_of
from nemo_aligner.parallel import collectives, world
from nemo_aligner.run.experiment import Experiment, ExperimentConfig
from nemo_aligner.run.progress import heartbeat

__all__ = [
    "Pretrained",
    "load_policy",
    "load_reward_model",
    "open_experiment",
    "resume_point",
    "save_result",
    "sft_loaders",
    "training_checkpoints",
    "warn_of_schedule",
]

logger = logging.getLogger(__name__)

SFTLoader = BatchLoader[Sample, TokenBatch]


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


@contextlib.contextmanager
def open_experiment(job: Job) -> Iterator[Experiment]:
    """The run's folder, the same on every rank."""
    config: ExperimentConfig = job.exp_manager
    folder = collectives.broadcast_object(config.folder())
    if world.is_logging_rank():
        logger.info("results go to %s", folder)
    with Experiment(config, folder, writes=world.is_logging_rank()) as run:
        yield run


@world.phase("looking for a checkpoint")
def resume_point(job: Job, run: Experiment) -> Checkpoint | None:
    """The checkpoint that the run goes on from: its folder's newest, else the one that the settings name.

    What interrupted saves have left in the folder is removed.

    Raises:
        UserError: there is none, and the settings ask for one.
    """
    found: Checkpoint | UserError | None = None
    if world.is_logging_rank():
        try:
            found = _find(job, run)
        except UserError as error:
            found = error
    found = collectives.broadcast_object(found)
    if isinstance(found, UserError):
        raise found
    return found


def _find(job: Job, run: Experiment) -> Checkpoint | None:
    config = job.exp_manager
    remove_unfinished(run.checkpoints_folder)
    named = config.resume_from_checkpoint or job.model.resume_from_checkpoint
    if config.resume_if_exists and (own := find_checkpoints(run.checkpoints_folder)):
        return own[-1]
    if named:
        return read_checkpoint(Path(named))
    if config.resume_if_exists and not config.resume_ignore_no_checkpoint:
        raise UserError(
            f"there is no checkpoint in {run.checkpoints_folder}, and "
            "exp_manager.resume_ignore_no_checkpoint=False",
            cure="set exp_manager.resume_ignore_no_checkpoint=True to start anew",
        )
    return None


def training_checkpoints(
    job: Job, run: Experiment, pretrained: Pretrained[Any]
) -> TrainingCheckpoints | None:
    """Where the run saves; None where it is not to."""
    if not job.exp_manager.create_checkpoint_callback:
        return None
    return TrainingCheckpoints(
        run.checkpoints_folder,
        job.exp_manager.checkpoint_callback_params,
        pretrained.learner,
        model_config=pretrained.config,
        files=pretrained.files,
    )


def save_result(
    job: Job, run: Experiment, pretrained: Pretrained[Any], checkpoints: TrainingCheckpoints | None
) -> None:
    """Write the trained model, or the best one of the run, as a .nemo; an earlier end of the same run is replaced."""
    params = job.exp_manager.checkpoint_callback_params
    if params.save_best_model and checkpoints is not None:
        checkpoints.save_best(run.nemo_path)
    elif params.save_nemo_on_train_end:
        pretrained.save(run.nemo_path, overwrite=True)


@world.phase("loading the model")
def load_policy(job: Job, *, start: Checkpoint | None = None) -> Pretrained[GPTPolicy]:
    """The language model that the job starts from, or goes on with from ``start``, its tokenizer and its config.

    Raises:
        UserError: the checkpoint is not there, damaged, or does not fit the layout or the overrides.
    """
    with _opened(job, start) as archive:
        config = _merged(job.model, archive)
        _refuse_reward_model(job, config)
        built, gpt = _built(job, config, head=None)
        with heartbeat("loading weights", enabled=world.is_logging_rank()):
            load_model(built, archive.weights)
        tokenizer, files = _load_tokenizer(archive, gpt.vocab_size), _tokenizer_files(archive)
    policy = GPTPolicy(
        built,
        eos_id=tokenizer.eos_id if tokenizer else None,
        kept_logits_bytes=job.model.kept_logits_mib << 20,
        seed=job.model.seed,
    )
    return Pretrained(learner=policy, tokenizer=tokenizer, config=config, files=files)


@world.phase("loading the model")
def load_reward_model(job: RMJob, *, start: Checkpoint | None = None) -> Pretrained[GPTCritic]:
    """A reward model: of a language model with a new head, or one that is gone on with.

    Raises:
        UserError: the checkpoint is not there, damaged, or does not fit the layout or the overrides.
    """
    with _opened(job, start) as archive:
        config = _merged(job.model, archive)
        head = head_config(config)
        assert head is not None
        built, gpt = _built(job, config, head=head)
        own = start is not None or (
            head_config(archive.config) == head
            and (job.model.reward_model_type == "binary_ranking" or job.model.regression.load_rm_head_weights)
        )
        with heartbeat("loading weights", enabled=world.is_logging_rank()):
            load_model(built, archive.weights, but=None if own else HEAD_NAME)
        if not own:
            draw_head(built, seed=job.model.seed)
        tokenizer, files = _load_tokenizer(archive, gpt.vocab_size), _tokenizer_files(archive)
    critic = GPTCritic(built, head=head, seed=job.model.seed)
    return Pretrained(learner=critic, tokenizer=tokenizer, config=config, files=files)


def _opened(job: Job, start: Checkpoint | None) -> contextlib.AbstractContextManager[NemoArchive]:
    return shared_nemo(start.path if start else job.pretrained[1])


def _merged(model: ModelConfig, archive: NemoArchive) -> dict[str, Any]:
    """model_config.yaml as it is to be saved: the checkpoint's with the settings' own."""
    if (unread := unread_keys(archive.config)) and world.is_logging_rank():
        logger.info("keys of model_config.yaml that are kept and not read: %s", ", ".join(unread))
    return {**archive.config, **model.architecture, **model.own_keys}


def _refuse_reward_model(job: Job, config: dict[str, Any]) -> None:
    if config.get("reward_model_type"):
        key, path = job.pretrained
        raise UserError(f"{key}={path} is a reward model and writes no text", cure="give a language model")


def _built(
    job: Job, config: dict[str, Any], *, head: HeadConfig | None
) -> tuple[GPT | InterleavedGPT, GPTConfig]:
    """The model that ``config`` describes, without weights; ``config`` is told the precision."""
    gpt = GPTConfig.from_dict(config)
    built = build_gpt(
        gpt,
        job.model.layout,
        dtype_of(job.trainer.precision),
        use_flash_attention=job.model.use_flash_attention,
        recompute=job.model.recompute,
        head=head,
    )
    config["precision"] = str(job.trainer.precision)
    return built, gpt


def _load_tokenizer(archive: NemoArchive, vocab_size: int) -> Tokenizer | None:
    tokenizer = load_archived_tokenizer(archive)
    if tokenizer is not None:
        check_fits(tokenizer, vocab_size)
    return tokenizer


def _tokenizer_files(archive: NemoArchive) -> dict[str, Path | bytes]:
    """All files of the archive but config, weights and training state, read while the archive is open."""
    names = {path: path.relative_to(archive.folder) for path in sorted(archive.folder.rglob("*"))}
    return {
        name.as_posix(): path.read_bytes()
        for path, name in names.items()
        if path.is_file() and name.parts[0] not in (CONFIG_NAME, WEIGHTS_NAME, *TRAINING_NAMES)
    }


def needed_tokenizer(job: Job, pretrained: Pretrained[Any]) -> Tokenizer:
    """The checkpoint's tokenizer.

    Raises:
        UserError: it has none.
    """
    if pretrained.tokenizer is None:
        key, path = job.pretrained
        raise UserError(
            f"{key}={path} holds no tokenizer, and training from text needs one",
            cure="import the Hugging Face folder again with its tokenizer files in it",
        )
    return pretrained.tokenizer


@world.phase("reading data")
def sft_loaders(job: SFTJob, pretrained: Pretrained[GPTPolicy]) -> tuple[SFTLoader, SFTLoader]:
    """Training and validation batches; the first training sample is shown.

    Raises:
        UserError: there is no tokenizer, or a file has a bad line.
    """
    model, data, tokenizer = job.model, job.model.data, needed_tokenizer(job, pretrained)
    gpt, multiple = pretrained.learner.model.gpt_config, model.length_multiple
    with heartbeat("reading data", enabled=world.is_logging_rank()):
        loaders = tuple(
            _loader(data, _capped(split, gpt, multiple), tokenizer, model)
            for split in (data.train_ds, data.validation_ds)
        )
    train, validation = loaders
    if world.is_logging_rank():
        shown = describe(train.dataset[0], tokenizer)
        logger.info("first training sample, learned tokens between ⟦ and ⟧:\n%s", shown)
        logger.info("%d training and %d validation samples", len(train.dataset), len(validation.dataset))
    return train, validation


def _capped(split: SFTSplitConfig, gpt: GPTConfig, multiple: int) -> SFTSplitConfig:
    """``split`` with the longest sequence that the model takes, a multiple of ``multiple`` tokens."""
    longest = min(split.max_seq_length, gpt.encoder_seq_length)
    if gpt.position_embedding_type == "learned_absolute" and longest > gpt.max_position_embeddings:
        raise UserError(
            f"sequences of {longest} tokens (model.data's max_seq_length={split.max_seq_length}, "
            f"model.encoder_seq_length={gpt.encoder_seq_length}) are longer than the model's "
            f"{gpt.max_position_embeddings} learned positions",
            cure=f"set model.encoder_seq_length={gpt.max_position_embeddings}",
        )
    return replace(split, max_seq_length=longest // multiple * multiple)


def _loader(
    data: SFTDataConfig, split: SFTSplitConfig, tokenizer: Tokenizer, model: SFTModelConfig
) -> SFTLoader:
    dataset = open_sft(data, split, tokenizer, answer_only_loss=model.answer_only_loss)
    sampler = GlobalBatchSampler(
        len(dataset),
        split.global_batch_size,
        shuffle=split.shuffle,
        seed=model.seed,
        drop_last=split.drop_last,
    )
    return SFTLoader(
        dataset,
        sampler,
        collate=collate,
        filler=empty_sample(tokenizer.pad_id),
        dp_rank=world.dp_rank(),
        dp_size=world.dp_size(),
        micro_batch_size=split.micro_batch_size,
        pad_id=tokenizer.pad_id,
        multiple=model.length_multiple,
        max_length=split.max_seq_length,
        one_length=world.pp_size() > 1,
        num_workers=data.num_workers,
    )


def warn_of_schedule(optim: OptimConfig, *, max_steps: int) -> None:
    """Say so where a short run leaves the warm-up or the cosine without their steps."""
    sched = optim.sched
    if not world.is_logging_rank():
        return
    if sched.warmup_steps >= max_steps:
        logger.warning(
            "the learning rate does not reach model.optim.lr=%g: the run has %d steps; "
            "set model.optim.sched.warmup_steps, now %d, below that",
            *(optim.lr, max_steps, sched.warmup_steps),
        )
    elif sched.decays and sched.warmup_steps + sched.constant_steps >= max_steps:
        logger.warning(
            "the learning rate goes to model.optim.sched.min_lr=%g right after the warm-up: "
            "warmup_steps=%d + constant_steps=%d leave none of the %d steps for the decay; "
            "set model.optim.sched.constant_steps=0",
            *(sched.min_lr, sched.warmup_steps, sched.constant_steps, max_steps),
        )
