# SPDX-License-Identifier: Apache-2.0
"""From a model as its run began to batches that know what it believes of them."""

from dataclasses import replace
from functools import partial

from nemo_aligner.algorithms.reference import annotate_by_swap, annotate_rated, with_stored_reference
from nemo_aligner.algorithms.supervised import Batches, SupervisedData
from nemo_aligner.builders.models import Pretrained, go_on_from
from nemo_aligner.checkpoint.trainer_state import Checkpoint
from nemo_aligner.data.collate import collate_mismatched
from nemo_aligner.data.mismatched import MismatchedRows
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
    pretrained: Pretrained[GPTPolicy], start: Checkpoint | None, data: SupervisedData
) -> SupervisedData:
    """Keep the model as it is now as the reference, then go on from ``start``.

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
        annotate=partial(annotate_rated, pretrained.learner),
    )


def _source(run: Experiment, pretrained: Pretrained[GPTPolicy]) -> dict[str, object]:
    """The model, its config and the data's settings, which log-probs follow from; {} on ranks that keep no files."""
    if run.identity is None:
        return {}
    model = run.identity.settings["model"]
    own = {name: model[name] for name in ("data", "peft", "seed")}  # the seed draws new adapters
    return {"model": run.identity.base_model, "config": pretrained.config, **own}
