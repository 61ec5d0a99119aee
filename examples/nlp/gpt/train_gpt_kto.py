# SPDX-License-Identifier: Apache-2.0
"""Kahneman-Tversky optimization: a language model learns from responses that are good or bad, each by itself.

python examples/nlp/gpt/train_gpt_kto.py pretrained_checkpoint.restore_from_path=sft.nemo \
    "model.data.data_prefix={train: [a.jsonl], validation: [b.jsonl], test: [b.jsonl]}"
"""

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from nemo_aligner.bounds import bounded, only
from nemo_aligner.config.base import TrainerConfig
from nemo_aligner.config.pairs import PairJob, PairLoopConfig, PairModelConfig
from nemo_aligner.data.config import PairDataConfig
from nemo_aligner.data.first_rows import check_rated_rows
from nemo_aligner.data.rated_rows import open_rated
from nemo_aligner.data.text_rows import ResponseFiles
from nemo_aligner.errors import UserError
from nemo_aligner.launch.script import script
from nemo_aligner.models.gpt.learning_rate import OptimConfig


@dataclass(frozen=True, kw_only=True)
class KTOConfig:
    # beta: reward per nat of log-prob above the reference
    ref_policy_kl_penalty: float = bounded(0.2, above=0)
    desirable_loss_weight: float = bounded(1.0, at_least=0)  # of good responses
    undesirable_loss_weight: float = bounded(1.0, at_least=0)  # of bad ones
    # responses of a forward pass of the reference; null: model.micro_batch_size
    log_prob_forward_micro_batch_size: int | None = bounded(None, at_least=1)
    preference_loss_weight: float = only(1.0)  # of the whole loss; only 1.0
    preference_average_log_probs: bool = only(False, what="a mean over tokens")  # of rewards; only False
    sft_loss_weight: float = only(0.0, what="a likelihood's loss")  # of a second loss; only 0.0
    sft_average_log_probs: bool = only(False)  # of the second loss; only False

    def __post_init__(self) -> None:
        if not (self.desirable_loss_weight or self.undesirable_loss_weight):
            raise UserError(
                "model.kto.desirable_loss_weight and model.kto.undesirable_loss_weight are 0: there is no loss",
                fix="set one of them above 0",
            )


@dataclass(frozen=True, kw_only=True)
class KTOLoopConfig(PairLoopConfig):
    block: ClassVar[str] = "trainer.kto"


@dataclass(frozen=True, kw_only=True)
class KTOTrainerConfig(TrainerConfig):
    kto: KTOLoopConfig = field(default_factory=KTOLoopConfig)  # the loop


@dataclass(frozen=True, kw_only=True)
class KTODataConfig(PairDataConfig):
    append_eod: bool = True  # end each response with EOS, unless it ends with the token that ends a turn


@dataclass(frozen=True, kw_only=True)
class KTOModelConfig(PairModelConfig):
    data: KTODataConfig  # where responses come from
    kto: KTOConfig = field(default_factory=KTOConfig)  # the loss
    optim: OptimConfig = field(default_factory=partial(OptimConfig, lr=9e-7, weight_decay=0.1))


@dataclass(frozen=True, kw_only=True)
class KTOJob(PairJob):
    model: KTOModelConfig
    trainer: KTOTrainerConfig = field(default_factory=KTOTrainerConfig)

    @property
    def responses(self) -> ResponseFiles:
        """See PairJob."""
        return ResponseFiles(open=open_rated, check_first=check_rated_rows, unit="responses")


@script("gpt_kto", KTOJob)
def main(job: KTOJob) -> None:
    """Have a language model prefer good responses."""
    from nemo_aligner import builders
    from nemo_aligner.objectives.kto import KTO

    settings = job.model.kto
    objective = KTO(
        beta=settings.ref_policy_kl_penalty,
        good_weight=settings.desirable_loss_weight,
        bad_weight=settings.undesirable_loss_weight,
    )
    with builders.open_experiment(job) as run:
        start = builders.resume_point(job, run)
        pretrained = builders.load_policy(job)
        data = builders.pair_loaders(job, pretrained, generates=True)
        rows = settings.log_prob_forward_micro_batch_size
        data = builders.with_kl_baseline(pretrained, start, data, rows=rows)
        trainer = builders.supervised_trainer(job, run, pretrained, objective, data)
        trainer.fit(start)
        builders.save_result(job, run, pretrained, trainer.checkpoints)


if __name__ == "__main__":
    main()
