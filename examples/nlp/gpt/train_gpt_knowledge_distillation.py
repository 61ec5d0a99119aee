# SPDX-License-Identifier: Apache-2.0
"""Knowledge distillation: a language model learns what another one holds likely, beside the texts themselves.

python examples/nlp/gpt/train_gpt_knowledge_distillation.py model.restore_from_path=student.nemo \
    model.knowledge_distillation.teacher=teacher.nemo \
    model.data.train_ds.file_path=train.jsonl model.data.validation_ds.file_path=validation.jsonl
"""

from dataclasses import dataclass

from nemo_aligner.bounds import bounded, only
from nemo_aligner.checkpoint.sources import peek_model
from nemo_aligner.config.sft import SFTJob, SFTModelConfig
from nemo_aligner.errors import UserError
from nemo_aligner.launch.script import script
from nemo_aligner.objectives.config import Divergence
from nemo_aligner.paths import PathText

TEACHER = "model.knowledge_distillation.teacher"


@dataclass(frozen=True, kw_only=True)
class KDConfig:
    # the model to learn from, with the student's tokenizer: a .nemo, a checkpoint, a Hugging Face folder, a GGUF file
    # or OWNER/NAME of the hub; it lies beside the student on the same ranks
    teacher: PathText
    # tokens in each place that the teacher is asked for, the most likely ones
    top_k: int = bounded(64, at_least=1)
    # fwd_kl: KL(teacher || student); bwd_kl: KL(student || teacher); js: the mean of both to their mixture
    kd_loss: Divergence = "fwd_kl"
    # count all other tokens as one more; False: the distributions are of the top_k alone
    tail: bool = True
    # the reciprocal of the student's temperature; with tail only 1.0
    logits_scale: float = bounded(1.0, above=0)
    target_logits_scale: float = bounded(1.0, above=0)  # of the teacher's; with tail only 1.0
    kd_loss_weight: float = bounded(1.0, at_least=0)  # of the divergence
    sft_loss_weight: float = bounded(0.0, at_least=0)  # of the texts' negative log-likelihood
    # ask the teacher about all rows before the first step and keep that in the run's folder, 8 bytes for each of top_k;
    # False: it lies beside the student and is asked at each step
    store_teacher: bool = False
    cross_tokenizer: bool = only(False, what="a teacher with another tokenizer")  # only False

    def __post_init__(self) -> None:
        scales = {"logits_scale": self.logits_scale, "target_logits_scale": self.target_logits_scale}
        for name, scale in scales.items():
            if self.tail and scale != 1:
                raise UserError(
                    f"model.knowledge_distillation.{name}={scale} is of the top_k alone, and tail=True",
                    fix="set model.knowledge_distillation.tail=False",
                )
        if self.top_k == 1 and not self.tail:
            raise UserError(
                "model.knowledge_distillation.top_k=1 with tail=False: of one token alone there is nothing to learn",
                fix="set model.knowledge_distillation.tail=True, or raise top_k",
            )
        if not (self.kd_loss_weight or self.sft_loss_weight):
            raise UserError(
                "model.knowledge_distillation.kd_loss_weight and sft_loss_weight are 0: there is no loss",
                fix="set one of them above 0",
            )


@dataclass(frozen=True, kw_only=True)
class KDModelConfig(SFTModelConfig):
    knowledge_distillation: KDConfig  # teacher and loss


@dataclass(frozen=True, kw_only=True)
class KDJob(SFTJob):
    model: KDModelConfig
    name: str = "megatron_gpt_distilled"

    def check_paths(self) -> None:
        """See ModelJob."""
        SFTJob.check_paths(self)
        peek_model(TEACHER, self.model.knowledge_distillation.teacher)


@script("gpt_knowledge_distillation", KDJob)
def main(job: KDJob) -> None:
    """Train a language model on what a teacher holds likely."""
    from nemo_aligner import builders
    from nemo_aligner.objectives.distillation import Distillation

    settings = job.model.knowledge_distillation
    objective = Distillation(
        kind=settings.kd_loss,
        tail=settings.tail,
        scale=settings.logits_scale,
        teacher_scale=settings.target_logits_scale,
        kd_weight=settings.kd_loss_weight,
        nll_weight=settings.sft_loss_weight,
    )
    with builders.open_experiment(job) as run:
        start = builders.resume_point(job, run)
        pretrained = builders.load_policy(job, start=start)
        data = builders.sft_loaders(job, pretrained)
        teacher = TEACHER, settings.teacher
        top_k, stored = settings.top_k, settings.store_teacher
        data = builders.with_teacher(job, teacher, pretrained, data, run=run, top_k=top_k, stored=stored)
        trainer = builders.supervised_trainer(job, run, pretrained, objective, data)
        trainer.fit(start)
        builders.save_result(job, run, pretrained, trainer.checkpoints)


if __name__ == "__main__":
    main()
