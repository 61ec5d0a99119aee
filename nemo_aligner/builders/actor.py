# SPDX-License-Identifier: Apache-2.0
"""From the settings of an online job to its run: a policy with its initial weights, prompts, a loss, and rewards."""

import logging
from collections.abc import Callable

from nemo_aligner.algorithms.ppo import OnlineObjective, PPOTrainer
from nemo_aligner.batch import ReferencedPairs
from nemo_aligner.builders.models import Pretrained, go_on_from, load_policy
from nemo_aligner.builders.reference import load_teacher
from nemo_aligner.builders.resume import resume_point
from nemo_aligner.builders.reward_sources import open_sources
from nemo_aligner.builders.rollouts import actor_prompts, actor_rollouts, rollout_sampling
from nemo_aligner.builders.runs import open_experiment, prepare_training, save_result, training_checkpoints
from nemo_aligner.checkpoint.trainer_state import Checkpoint
from nemo_aligner.config.ppo import ActorJob
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.objectives.policy import PolicyGradient
from nemo_aligner.objectives.protocol import Objective
from nemo_aligner.rollout_batch import ScoredRollout

logger = logging.getLogger(__name__)


def train_actor(
    job: ActorJob,
    *,
    loss: Objective | None = None,
    pairs: Callable[[ScoredRollout], ReferencedPairs] | None = None,
) -> None:
    """Run the job: a policy that learns from its responses, by the job's teacher if it has one.

    Args:
        job: the settings.
        loss: of the policy; None: :func:`policy_gradient`.
        pairs: makes one pair of the responses to each prompt, which ``loss`` is of; None: it is of credited responses.
    """
    with open_experiment(job) as run:
        start = resume_point(job, run)
        if idle := job.trainer.ppo.idle:
            keys = ", ".join(f"trainer.ppo.{name}" for name in idle)
            logger.warning("without effect, as trainer.ppo.initial_policy_kl_penalty is 0: %s", keys)
        pretrained = load_actor(job, start)
        objective = OnlineObjective(
            loss=loss or policy_gradient(job, pretrained),
            pairs=pairs,
            with_reference=job.asks_initial_policy,
            teacher=load_teacher(job, job.teacher, pretrained, scores=True) if job.teacher else None,
        )
        prompts = actor_prompts(job, pretrained)
        checkpoints = training_checkpoints(job, run, pretrained)
        trainer = PPOTrainer(
            job.trainer.ppo,
            actor_rollouts(job, pretrained),
            pretrained.learner,
            objective,
            prompts,
            run,
            checkpoints,
        )
        prepare_training(job, pretrained, max_steps=trainer.plan.max_steps * trainer.updates.per_rollout)
        if start is not None:
            trainer.resume(start)
        with open_sources(job, run, pretrained, start) as sources:
            trainer.fit(sources)
            save_result(job, run, pretrained, checkpoints)


def load_actor(job: ActorJob, start: Checkpoint | None) -> Pretrained[GPTPolicy]:
    """The policy where ``start`` has it, and beside it the weights that it began with, where they are asked for.

    Raises:
        UserError: a checkpoint is not there, damaged, or does not fit the layout or the overrides.
    """
    if not job.asks_initial_policy:
        return load_policy(job, start=start)
    pretrained = load_policy(job)
    pretrained.learner.keep_reference()
    go_on_from(pretrained, start)
    return pretrained


def policy_gradient(job: ActorJob, pretrained: Pretrained[GPTPolicy]) -> PolicyGradient:
    """The policy's loss; with trainer.ppo.kl_placement=loss the KL to the initial policy is a part of it."""
    config = job.trainer.ppo
    in_loss = config.kl_placement == "loss"
    return PolicyGradient(
        job.model.ppo,
        kl_coefficient=config.initial_policy_kl_penalty if in_loss else 0.0,
        kl_estimator=config.estimator_of_kl,
        max_length=rollout_sampling(job, pretrained).max_length,
    )
