# SPDX-License-Identifier: Apache-2.0
"""On-policy distillation: a language model learns what a teacher holds likely of the responses that it writes itself.

python examples/nlp/gpt/train_gpt_on_policy_distillation.py pretrained_checkpoint.restore_from_path=student.nemo \
    model.on_policy_distillation.teacher=teacher.nemo "model.data.data_prefix={train: [prompts.jsonl]}"
"""

from dataclasses import dataclass, field
from functools import partial

from nemo_aligner.bounds import only
from nemo_aligner.checkpoint.sources import peek_model
from nemo_aligner.config import ppo
from nemo_aligner.launch.script import script
from nemo_aligner.models.gpt.learning_rate import OptimConfig, SchedConfig
from nemo_aligner.paths import PathText


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    # the model to learn from, with the student's tokenizer: a .nemo, a checkpoint, a Hugging Face folder, a GGUF file
    # or OWNER/NAME of the hub; it lies beside the student on the same ranks
    teacher: PathText


@dataclass(frozen=True, kw_only=True)
class OPDConfig(ppo.ActorConfig):
    """Each token is credited by the teacher; ``trainer.ppo.rewards`` are only reported."""

    advantage_estimator: str = only("teacher", what="another estimator than the teacher's")  # only teacher
    initial_policy_kl_penalty: float = 0.0  # only 0: the teacher is what the policy is compared with
    mask_unfinished: bool = False


@dataclass(frozen=True, kw_only=True)
class OPDTrainerConfig(ppo.ActorTrainerConfig):
    ppo: OPDConfig = field(default_factory=OPDConfig)


@dataclass(frozen=True, kw_only=True)
class OPDRolloutConfig(ppo.ActorRolloutConfig):
    """One response to a prompt: tokens are compared with the teacher, not responses with each other."""

    num_rollout_samples: int = 64
    rollout_micro_batch_size: int = 32


@dataclass(frozen=True, kw_only=True)
class OPDModelConfig(ppo.ActorModelConfig):
    ppo: OPDRolloutConfig = field(default_factory=OPDRolloutConfig)
    on_policy_distillation: TeacherConfig  # the teacher
    optim: OptimConfig = field(
        default_factory=partial(OptimConfig, lr=1e-6, weight_decay=0.1, sched=SchedConfig(name="constant"))
    )


@dataclass(frozen=True, kw_only=True)
class OPDJob(ppo.CriticFreeJob):
    model: OPDModelConfig
    trainer: OPDTrainerConfig = field(default_factory=OPDTrainerConfig)
    name: str = "megatron_gpt_distilled"

    @property
    def teacher(self) -> tuple[str, str]:
        """See ActorJob."""
        return "model.on_policy_distillation.teacher", self.model.on_policy_distillation.teacher

    def check_paths(self) -> None:
        """See ModelJob."""
        ppo.ActorJob.check_paths(self)
        peek_model(*self.teacher)


@script("gpt_on_policy_distillation", OPDJob)
def main(job: OPDJob) -> None:
    """Have a language model write what a teacher would."""
    from nemo_aligner.builders.actor import train_actor

    train_actor(job)


if __name__ == "__main__":
    main()
