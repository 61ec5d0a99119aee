# SPDX-License-Identifier: Apache-2.0
"""From rows and a model to pairs of the rows' responses and the model's own."""

from dataclasses import replace

from nemo_aligner.algorithms.own_responses import OwnPairs, OwnResponses, iteration_of
from nemo_aligner.algorithms.ppo_config import OwnResponsesConfig
from nemo_aligner.algorithms.supervised import SupervisedData
from nemo_aligner.builders.kept_references import KeptReferences
from nemo_aligner.builders.models import Pretrained, go_on_from
from nemo_aligner.checkpoint.trainer_state import Checkpoint
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.objectives.nll import NLL
from nemo_aligner.run.experiment import Experiment


def with_own_responses(
    run: Experiment,
    pretrained: Pretrained[GPTPolicy],
    start: Checkpoint | None,
    data: SupervisedData,
    config: OwnResponsesConfig,
    *,
    seed: int,
    renew_every: int,
) -> SupervisedData:
    """Make the model the reference that ``start`` was trained with, then go on from ``start``.

    Args:
        config: how the reference responds.
        seed: of the draws.
        renew_every: steps after which the model becomes its own next reference.

    Returns:
        The data of single responses, each paired with one by the reference; validated as texts.

    Raises:
        UserError: the reference that ``start`` was trained with is not there, or damaged.
    """
    policy, train = pretrained.learner, data.train
    references = KeptReferences(policy=policy, run=run)
    iteration = 0 if start is None else iteration_of(start.state.step, renew_every)
    if start is not None and iteration:
        references.load(iteration, start)
    policy.keep_reference()
    go_on_from(pretrained, start)
    responses = OwnResponses(
        policy=policy,
        sampling=config.sampling(max_length=train.max_length, seed=seed),
        slots=config.rollout_micro_batch_size,
        pad_id=train.pad_id,
        multiple=train.multiple,
        max_length=train.max_length,
        one_length=train.one_length,
    )
    made = OwnPairs(
        responses=responses,
        renew_every=renew_every,
        iteration=iteration,
        renew=references.renew,
        pairs=config.log_prob_forward_micro_batch_size,
    )
    return replace(data, annotate=made.annotate, before_step=made.before_step, validated=NLL())
