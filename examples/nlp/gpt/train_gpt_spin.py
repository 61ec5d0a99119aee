# SPDX-License-Identifier: Apache-2.0
"""Self-play fine-tuning (SPIN): a language model learns to prefer a data set's responses to its own earlier ones.

python examples/nlp/gpt/train_gpt_spin.py model.restore_from_path=sft.nemo \
    model.data.train_ds.file_path=train.jsonl model.data.validation_ds.file_path=validation.jsonl
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

from nemo_aligner.algorithms.ppo_config import LengthConfig, ResponseConfig, SamplingParams
from nemo_aligner.bounds import bounded, only
from nemo_aligner.config.base import TrainerConfig
from nemo_aligner.config.sft import SFTModelConfig, TextJob
from nemo_aligner.data.config import SFTDataConfig
from nemo_aligner.launch.script import script
from nemo_aligner.models.gpt.learning_rate import OptimConfig
from nemo_aligner.objectives.config import DPOConfig
from nemo_aligner.run.schedule import SupervisedConfig


@dataclass(frozen=True, kw_only=True)
class SPINSamplingParams(SamplingParams):
    add_BOS: bool = only(False, what="another start of prompts than that of rows")  # only False: rows have it


@dataclass(frozen=True, kw_only=True)
class SPINLengthConfig(LengthConfig):
    # tokens of the opponent's response, at most; null: what max_seq_length leaves
    max_length: int | None = bounded(None, at_least=1)


@dataclass(frozen=True, kw_only=True)
class SPINConfig(ResponseConfig):
    # beta: reward per nat of log-prob above the opponent's
    ref_policy_kl_penalty: float = bounded(0.1, above=0)
    # how responses are drawn; the losses are of the model's own distribution
    sampling_params: SPINSamplingParams = field(default_factory=SPINSamplingParams)
    length_params: SPINLengthConfig = field(default_factory=SPINLengthConfig)  # when a response ends
    rollout_micro_batch_size: int = bounded(64, at_least=1)  # responses that a rank generates at once
    # pairs of a forward pass of the opponent; null: model.data.train_ds.micro_batch_size
    log_prob_forward_micro_batch_size: int | None = bounded(None, at_least=1)


@dataclass(frozen=True, kw_only=True)
class SPINLoopConfig(SupervisedConfig):
    block: ClassVar[str] = "trainer.spin"

    # opponents: the model as training began, then as each iteration ended
    max_iterations: int = bounded(1, at_least=1)
    # passes over the training data in an iteration; null: one
    max_epochs: int | None = bounded(1, at_least=1)

    @property
    def passes(self) -> tuple[int, str]:
        """See LoopConfig; those of all iterations."""
        passes = (self.max_epochs or 1) * self.max_iterations
        return passes, f"{self.block}.max_iterations={self.max_iterations}"


@dataclass(frozen=True, kw_only=True)
class SPINTrainerConfig(TrainerConfig):
    spin: SPINLoopConfig = field(default_factory=SPINLoopConfig)  # the loop


@dataclass(frozen=True, kw_only=True)
class SPINDataConfig(SFTDataConfig):
    # of conversations: the last turn is played for
    learn: str = only("last", what="a game of several turns")
    plain_text: bool = only(False, what="a game without prompts")  # only False
    packing: bool = only(False)  # only False: a response is written to each row


@dataclass(frozen=True, kw_only=True)
class SPINModelConfig(SFTModelConfig):
    data: SPINDataConfig  # where samples come from
    spin: SPINConfig = field(default_factory=SPINConfig)  # the game
    # only True: prompts are what responses are written to
    answer_only_loss: bool = only(True, what="learning prompts")
    optim: OptimConfig = field(default_factory=partial(OptimConfig, lr=5e-7, weight_decay=0.0))


@dataclass(frozen=True, kw_only=True)
class SPINJob(TextJob):
    resume_rules = (
        ("trainer.spin.max_epochs", "fixed", "the steps of an iteration follow from it"),
        ("trainer.spin.max_iterations", "free", "how long the run is"),
    )

    model: SPINModelConfig
    trainer: SPINTrainerConfig = field(default_factory=SPINTrainerConfig)
    name: str = "megatron_gpt_spin"


@script("gpt_spin", SPINJob)
def main(job: SPINJob) -> None:
    """Have a language model prefer the data's responses to its own."""
    from nemo_aligner import builders
    from nemo_aligner.algorithms.own_responses import OwnResponses
    from nemo_aligner.objectives.nll import NLL
    from nemo_aligner.objectives.preference import DPO
    from nemo_aligner.run.schedule import limited

    settings, loop = job.model.spin, job.trainer.spin
    with builders.open_experiment(job) as run:
        start = builders.resume_point(job, run)
        pretrained = builders.load_policy(job)
        data = builders.sft_loaders(job, pretrained)
        steps = limited(data.train.batches_per_epoch, loop.limit_train_batches) * loop.passes[0]
        every = steps // loop.max_iterations
        reference = builders.renewed_reference(run, pretrained, start, every=every)
        own = OwnResponses(
            policy=pretrained.learner,
            config=settings,
            loader=data.train,
            seed=job.model.seed,
            slots=settings.rollout_micro_batch_size,
            scoring_rows=settings.log_prob_forward_micro_batch_size,
        )
        annotate = partial(own.annotate, reference)
        data = replace(data, annotate=annotate, before_step=reference.before_step, validated=NLL())
        objective = DPO(DPOConfig(ref_policy_kl_penalty=settings.ref_policy_kl_penalty))
        trainer = builders.supervised_trainer(job, run, pretrained, objective, data)
        trainer.fit(start)
        builders.save_result(job, run, pretrained, trainer.checkpoints)


if __name__ == "__main__":
    main()
