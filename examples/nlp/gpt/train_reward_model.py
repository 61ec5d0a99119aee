# SPDX-License-Identifier: Apache-2.0
"""Reward model training, on pairs of responses or on labeled ones; docs/training.md has its data and a cluster's flags.

python examples/nlp/gpt/train_reward_model.py pretrained_checkpoint.restore_from_path=sft.nemo \
    "model.data.data_prefix={train: [train.jsonl], validation: [validation.jsonl], test: [test.jsonl]}"
"""

from nemo_aligner.config.reward import RMJob
from nemo_aligner.launch.script import script


@script("training_rm", RMJob)
def main(job: RMJob) -> None:
    """Give a language model a scalar head, and train it on which responses people prefer."""
    from nemo_aligner import builders

    with builders.open_experiment(job) as run:
        start = builders.resume_point(job, run)
        pretrained = builders.load_reward_model(job, start=start)
        data = builders.pair_loaders(job, pretrained)
        objective = builders.reward_objective(job.model)
        trainer = builders.supervised_trainer(job, run, pretrained, objective, data)
        trainer.fit(start)
        if job.model.reward_standardization.enable:
            builders.standardize(job, pretrained, trainer.validate())
        builders.save_result(job, run, pretrained, trainer.checkpoints)


if __name__ == "__main__":
    main()
