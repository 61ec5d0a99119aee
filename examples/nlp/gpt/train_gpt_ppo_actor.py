# SPDX-License-Identifier: Apache-2.0
"""Proximal Policy Optimization: the actor's job. serve_ppo_critic.py runs beside it; docs/RLHFTraining.md has both.

python examples/nlp/gpt/train_gpt_ppo_actor.py pretrained_checkpoint.restore_from_path=sft.nemo \
    "model.data.data_prefix={train: [train.jsonl], validation: [test.jsonl], test: [test.jsonl]}"
"""

from nemo_aligner.config.ppo import ActorJob
from nemo_aligner.launch.script import script


@script("gpt_ppo_actor", ActorJob)
def main(job: ActorJob) -> None:
    """Have a language model learn from what a reward model says of its answers."""
    from nemo_aligner import builders
    from nemo_aligner.algorithms.ppo import PPOTrainer
    from nemo_aligner.builders import actor

    config = job.trainer.ppo
    with builders.open_experiment(job) as run:
        start = builders.resume_point(job, run)
        pretrained = actor.load_actor(job, start)
        prompts = actor.actor_prompts(job, pretrained)
        checkpoints = builders.training_checkpoints(job, run, pretrained)
        rollouts = actor.actor_rollouts(job, pretrained)
        objective = actor.actor_objective(job)
        trainer = PPOTrainer(config, rollouts, pretrained.learner, objective, prompts, run, checkpoints)
        updates = trainer.plan.max_steps * trainer.updates.per_rollout
        builders.prepare_training(job, pretrained, max_steps=updates)
        if start is not None:
            trainer.resume(start)
        with actor.open_sources(job, run, pretrained, start) as sources:
            trainer.fit(sources)
            builders.save_result(job, run, pretrained, checkpoints)


if __name__ == "__main__":
    main()
