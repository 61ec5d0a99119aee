# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning. On a laptop: `make quickstart-sft`; its flags and a cluster's are in docs/training.md.

python examples/nlp/gpt/train_gpt_sft.py model.restore_from_path=model.nemo \
    model.data.train_ds.file_path=train.jsonl model.data.validation_ds.file_path=validation.jsonl
"""

from nemo_aligner.config.sft import SFTJob
from nemo_aligner.launch.script import script


@script("gpt_sft", SFTJob)
def main(job: SFTJob) -> None:
    """Fine-tune a checkpoint on prompts and responses, or on conversations."""
    from nemo_aligner import builders
    from nemo_aligner.objectives.nll import NLL

    with builders.open_experiment(job) as run:
        start = builders.resume_point(job, run)
        pretrained = builders.load_policy(job, start=start)
        data = builders.sft_loaders(job, pretrained)
        trainer = builders.supervised_trainer(job, run, pretrained, NLL(), data)
        trainer.fit(start)
        builders.save_result(job, run, pretrained, trainer.checkpoints)


if __name__ == "__main__":
    main()
