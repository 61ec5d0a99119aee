# SPDX-License-Identifier: Apache-2.0
"""From another model to batches that know what it believes of them: the model as its run began, or a teacher."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from nemo_aligner.algorithms.asked_once import Question, ask_once
from nemo_aligner.algorithms.reference import (
    annotate_by_swap,
    annotate_by_teacher,
    annotate_rated,
    reference_question,
    teacher_question,
)
from nemo_aligner.algorithms.supervised import Batches, SupervisedData
from nemo_aligner.builders.kept_references import renewed_reference
from nemo_aligner.builders.models import Pretrained, go_on_from, load_frozen_policy, require_tokenizer
from nemo_aligner.builders.resume import quick_digest
from nemo_aligner.checkpoint.trainer_state import Checkpoint
from nemo_aligner.config.base import ModelJob
from nemo_aligner.config.pairs import ReferenceConfig
from nemo_aligner.config.resume import flat, rule_for
from nemo_aligner.data.collate import collate_mismatched
from nemo_aligner.data.mismatched import MismatchedRows
from nemo_aligner.data.tokenizer import Tokenizer, tokenizer_probe
from nemo_aligner.errors import UserError, located
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.run.experiment import Experiment


def with_reference_logprobs(
    run: Experiment,
    pretrained: Pretrained[GPTPolicy],
    start: Checkpoint | None,
    data: SupervisedData,
    config: ReferenceConfig,
) -> SupervisedData:
    """Keep the model as it is now as the reference, then go on from ``start``.

    Args:
        config: whether the reference's log-probs of all batches are computed now, and kept in the run's folder, or its
            weights beside the model's, which are swapped in at each step; and whether it is renewed.

    Returns:
        The data, whose batches come with the reference's log-probs.
    """
    policy, pairs = pretrained.learner, config.log_prob_forward_micro_batch_size
    swapped = replace(data, annotate=partial(annotate_by_swap, policy, pairs=pairs))
    if config.renew_reference_every is not None:
        reference = renewed_reference(run, pretrained, start, every=config.renew_reference_every)
        return replace(swapped, before_step=reference.before_step)
    if config.store_reference:
        question = reference_question(policy, source=_source(run, pretrained), pairs=pairs)
        data = _asked_once(question, data, run.folder / "reference_logprobs")
    else:
        policy.keep_reference()
        data = swapped
    go_on_from(pretrained, start)
    return data


def with_kl_baseline(
    pretrained: Pretrained[GPTPolicy],
    start: Checkpoint | None,
    data: SupervisedData,
    *,
    rows: int | None = None,
) -> SupervisedData:
    """Keep the model as it is now as the reference, then go on from ``start``.

    Args:
        rows: of a forward pass of the reference; None: a micro-batch.

    Returns:
        The data of single responses, whose batches come with the reference's log-probs and the KL to it.

    Raises:
        UserError: the rows of a data set have one prompt.
    """
    pretrained.learner.keep_reference()
    go_on_from(pretrained, start)

    def mismatched(name: str, loader: Batches) -> Batches:
        with located(lambda: f"model.data.data_prefix.{name}: "):
            rows = MismatchedRows(loader.dataset, loader.max_length)
        return replace(loader, dataset=rows, collate=collate_mismatched)

    return SupervisedData(
        train=mismatched("train", data.train),
        validation={name: mismatched(name, loader) for name, loader in data.validation.items()},
        annotate=partial(annotate_rated, pretrained.learner, rows=rows),
    )


def with_teacher(
    job: ModelJob,
    teacher: tuple[str, str],
    pretrained: Pretrained[GPTPolicy],
    data: SupervisedData,
    *,
    run: Experiment,
    top_k: int,
    stored: bool,
) -> SupervisedData:
    """Load a teacher beside the model that is trained, or ask it now and have it no more.

    Args:
        teacher: (setting, path).
        top_k: tokens in each place that the teacher is asked for, at most.
        stored: ask it about all batches now, and keep what it says in the run's folder; it is not even loaded where
            all of that is there.

    Returns:
        The data, whose batches come with the teacher's most likely tokens of each place.

    Raises:
        UserError: the teacher does not load, or has other tokens than the student.
    """
    if not stored:
        policy = load_teacher(job, teacher, pretrained)
        return replace(data, annotate=partial(annotate_by_teacher, policy, top_k=top_k))
    source = _source(run, pretrained)
    if source:
        source |= {"model": quick_digest(teacher[1])}
    load = cache(partial(load_teacher, job, teacher, pretrained))
    question = teacher_question(load, source=source, top_k=top_k)
    return _asked_once(question, data, run.folder / "teacher")


def _asked_once(question: Question, data: SupervisedData, folder: Path) -> SupervisedData:
    """The data, all of whose rows carry what is asked now."""
    validation = {
        name: ask_once(question, batches, folder / name) for name, batches in data.validation.items()
    }
    return replace(data, train=ask_once(question, data.train, folder / "train"), validation=validation)


def load_teacher(
    job: ModelJob, teacher: tuple[str, str], pretrained: Pretrained[GPTPolicy], *, scores: bool = False
) -> GPTPolicy:
    """Load a teacher beside the student that is trained.

    Args:
        job: of the student.
        teacher: (setting, path).
        pretrained: the student.
        scores: the teacher is asked about tokens of the student; else the student about tokens of the teacher.

    Raises:
        UserError: the teacher does not load, or has other tokens than the student.
    """
    named, own = "=".join(teacher), require_tokenizer(job, pretrained)
    student = pretrained.learner.model.gpt_config

    def check(gpt: GPTConfig, tokenizer: Tokenizer | None) -> None:
        if tokenizer is None:
            raise UserError(f"{named} has no tokenizer", fix="give a teacher with its tokenizer")
        if tokenizer_probe(tokenizer) != tokenizer_probe(own):
            raise UserError(
                f"{named} cuts a text into other tokens than the student {job.pretrained[0]}={job.pretrained[1]}",
                fix="give a teacher and a student with one tokenizer",
            )
        if scores and gpt.vocab_size < student.vocab_size:
            raise UserError(
                f"{named} has {gpt.vocab_size} tokens, and the student has {student.vocab_size}",
                fix="give a teacher with as many tokens, or more",
            )

    # Ids from the student's size on pad the teacher's embeddings: the tokenizers are one.
    known = None if scores else student.vocab_size
    return load_frozen_policy(job, *teacher, check=check, end_ids=pretrained.learner.end_ids, known_ids=known)


def _source(run: Experiment, pretrained: Pretrained[GPTPolicy]) -> dict[str, object]:
    """The model, its config and the data's settings, which log-probs follow from; {} on ranks that keep no files."""
    if run.identity is None:
        return {}
    model = run.identity.settings["model"]
    # The seed draws new adapters; those to begin with are a part of the model.
    own = {name: model.get(name) for name in ("seed", "answer_only_loss")}
    own["peft"] = {name: value for name, value in model["peft"].items() if name != "restore_from_path"}
    return {"model": run.identity.base_model, "config": pretrained.config, "data": _tokenizing(model), **own}


def _tokenizing(model: Mapping[str, Any]) -> dict[str, object]:
    """The settings of data that rows' tokens may follow from: those that may not change freely on resume."""
    settings = flat({"model": {"data": model["data"]}})
    # All keys of a validation set are free; which of them tokens follow from, those of the training set say.
    rules = {key: rule_for(key.replace(".validation_ds.", ".train_ds.")) for key in settings}
    return {key: settings[key] for key, rule in rules.items() if not (rule and rule[1] == "free")}
