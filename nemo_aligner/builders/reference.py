# SPDX-License-Identifier: Apache-2.0
"""From another model to batches that know what it believes of them: the model as its run began, or a teacher."""

from dataclasses import replace
from functools import partial

from nemo_aligner.algorithms.reference import (
    annotate_by_swap,
    annotate_by_teacher,
    annotate_rated,
    with_stored_reference,
)
from nemo_aligner.algorithms.supervised import Batches, SupervisedData
from nemo_aligner.builders.models import Pretrained, go_on_from, load_frozen_policy, require_tokenizer
from nemo_aligner.checkpoint.trainer_state import Checkpoint
from nemo_aligner.config.base import ModelJob
from nemo_aligner.data.collate import collate_mismatched
from nemo_aligner.data.mismatched import MismatchedRows
from nemo_aligner.data.tokenizer import Tokenizer, tokenizer_probe
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.run.experiment import Experiment


def with_reference_logprobs(
    run: Experiment,
    pretrained: Pretrained[GPTPolicy],
    start: Checkpoint | None,
    data: SupervisedData,
    *,
    stored: bool,
    pairs: int | None = None,
) -> SupervisedData:
    """Keep the model as it is now as the reference, then go on from ``start``.

    Args:
        stored: compute the reference's log-probs of all batches now, and keep them in the run's folder; else keep its
            weights beside the model's, and swap them in at each step.
        pairs: of a forward pass of the reference; None: a micro-batch.

    Returns:
        The data, whose batches come with the reference's log-probs.
    """
    policy = pretrained.learner
    if stored:
        folder = run.folder / "reference_logprobs"
        store = partial(with_stored_reference, policy, source=_source(run, pretrained), pairs=pairs)
        data = SupervisedData(
            train=store(data.train, folder / "train.pt"),
            validation={
                name: store(batches, folder / f"{name}.pt") for name, batches in data.validation.items()
            },
        )
    else:
        policy.keep_reference()
        data = replace(data, annotate=partial(annotate_by_swap, policy, pairs=pairs))
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

    def mismatched(loader: Batches) -> Batches:
        rows = MismatchedRows(loader.dataset, loader.max_length)
        return replace(loader, dataset=rows, collate=collate_mismatched)

    return SupervisedData(
        train=mismatched(data.train),
        validation={name: mismatched(loader) for name, loader in data.validation.items()},
        annotate=partial(annotate_rated, pretrained.learner, rows=rows),
    )


def with_teacher(
    job: ModelJob,
    teacher: tuple[str, str],
    pretrained: Pretrained[GPTPolicy],
    data: SupervisedData,
    *,
    top_k: int,
) -> SupervisedData:
    """Load a teacher beside the model that is trained.

    Args:
        teacher: (setting, path).
        top_k: tokens in each place that the teacher is asked for, at most.

    Returns:
        The data, whose batches come with the teacher's most likely tokens of each place.

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
        if gpt.vocab_size > student.vocab_size:
            raise UserError(
                f"{named} has {gpt.vocab_size} tokens, and the student has {student.vocab_size}",
                fix="give a teacher with as many tokens, or fewer",
            )

    policy = load_frozen_policy(job, *teacher, check=check)
    top_k = min(top_k, policy.model.gpt_config.vocab_size)
    return replace(data, annotate=partial(annotate_by_teacher, policy, top_k=top_k))


def _source(run: Experiment, pretrained: Pretrained[GPTPolicy]) -> dict[str, object]:
    """The model, its config and the data's settings, which log-probs follow from; {} on ranks that keep no files."""
    if run.identity is None:
        return {}
    model = run.identity.settings["model"]
    own = {name: model[name] for name in ("data", "peft", "seed")}  # the seed draws new adapters
    return {"model": run.identity.base_model, "config": pretrained.config, **own}
