# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning. On a laptop: `make quickstart-sft`; its flags and a cluster's are in docs/training.md.

python examples/nlp/gpt/train_gpt_sft.py model.restore_from_path=model.nemo \
    model.data.train_ds.file_path=train.jsonl model.data.validation_ds.file_path=validation.jsonl
"""

from nemo_aligner.config import SFTJob
from nemo_aligner.launch.script import script


@script("gpt_sft", SFTJob)
def main(job: SFTJob) -> None:
    """Fine-tune a checkpoint on prompts and answers, or on conversations."""
    from nemo_aligner.algorithms.supervised import SupervisedTrainer
    from nemo_aligner.builders import load_pretrained, open_experiment, sft_loaders, warn_of_schedule
    from nemo_aligner.objectives.nll import NLL

    config = job.trainer.sft
    with open_experiment(job) as run:
        pretrained = load_pretrained(job.model, precision=job.trainer.precision)
        train, validation = sft_loaders(job.model.data, pretrained, job.model)
        trainer = SupervisedTrainer(config, pretrained.policy, NLL(), train, validation, run)
        warn_of_schedule(job.model.optim, max_steps=trainer.plan.max_steps)
        pretrained.policy.prepare_training(
            job.model.optim, clip_grad=config.gradient_clip_val, max_steps=trainer.plan.max_steps
        )
        trainer.fit()
        if job.exp_manager.checkpoint_callback_params.save_nemo_on_train_end:
            pretrained.save(run.nemo_path)


if __name__ == "__main__":
    main()
