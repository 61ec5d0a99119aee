# SPDX-License-Identifier: Apache-2.0
"""DPO, IPO, RPO, SimPO, ORPO and their kin: a language model learns from pairs of responses.

python examples/nlp/gpt/train_gpt_dpo.py pretrained_checkpoint.restore_from_path=sft.nemo \
    "model.data.data_prefix={train: [a.jsonl], validation: [b.jsonl], test: [b.jsonl]}"
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

from nemo_aligner.bounds import only
from nemo_aligner.config.base import TrainerConfig
from nemo_aligner.config.pairs import PairJob, PairLoopConfig, PairModelConfig, ReferenceConfig
from nemo_aligner.data.config import PairDataConfig
from nemo_aligner.data.text_rows import ResponseFiles, open_pairs
from nemo_aligner.launch.script import script
from nemo_aligner.models.gpt.learning_rate import OptimConfig
from nemo_aligner.objectives.config import REFERENCED, DPOConfig


@dataclass(frozen=True, kw_only=True)
class DPOSettings(ReferenceConfig, DPOConfig):
    # {setting: the losses that read it}; with another loss it must keep its default
    of_losses: ClassVar = {
        **DPOConfig.of_losses,
        **dict.fromkeys(ReferenceConfig.__dataclass_fields__, REFERENCED),
    }


@dataclass(frozen=True, kw_only=True)
class DPOLoopConfig(PairLoopConfig):
    block: ClassVar[str] = "trainer.dpo"


@dataclass(frozen=True, kw_only=True)
class DPOTrainerConfig(TrainerConfig):
    dpo: DPOLoopConfig = field(default_factory=DPOLoopConfig)  # the loop


@dataclass(frozen=True, kw_only=True)
class DPODataConfig(PairDataConfig):
    append_eod: bool = True  # end each response with EOS, unless it ends with the token that ends a turn
    # of rpo_*: the reward of a chosen response, where a row has no chosen_reward
    default_chosen_reward: float = 1.0
    # of rpo_*: the reward of a rejected response, where a row has no rejected_reward
    default_rejected_reward: float = 0.0
    # only null: rows are padded to the longest of their step
    pad_length_to_multiple_of: int | None = only(None)


@dataclass(frozen=True, kw_only=True)
class DPOModelConfig(PairModelConfig):
    data: DPODataConfig  # where pairs come from
    dpo: DPOSettings = field(default_factory=DPOSettings)  # the loss
    optim: OptimConfig = field(default_factory=partial(OptimConfig, lr=9e-7, weight_decay=0.1))


@dataclass(frozen=True, kw_only=True)
class DPOJob(PairJob):
    resume_rules = (("model.dpo.renew_reference_every", "fixed", "references are numbered by it"),)

    model: DPOModelConfig
    trainer: DPOTrainerConfig = field(default_factory=DPOTrainerConfig)

    def check(self, world_size: int | None = None) -> None:
        """See ModelJob."""
        PairJob.check(self, world_size)
        self.model.dpo.check_reference("model.dpo")

    @property
    def responses(self) -> ResponseFiles:
        """See PairJob."""
        usual = self.model.data.default_chosen_reward, self.model.data.default_rejected_reward
        return replace(super().responses, open=partial(open_pairs, default_rewards=usual))


@script("gpt_dpo", DPOJob)
def main(job: DPOJob) -> None:
    """Have a language model prefer the chosen responses."""
    from nemo_aligner import builders
    from nemo_aligner.objectives.preference import DPO

    settings = job.model.dpo
    with builders.open_experiment(job) as run:
        start = builders.resume_point(job, run)
        # The reference is the model before training: with_reference_logprobs keeps it, then loads start.
        pretrained = builders.load_policy(job, start=None if settings.has_reference else start)
        data = builders.pair_loaders(job, pretrained, generates=True)
        if settings.has_reference:
            data = builders.with_reference_logprobs(run, pretrained, start, data, settings)
        trainer = builders.supervised_trainer(job, run, pretrained, DPO(settings), data)
        trainer.fit(start)
        builders.save_result(job, run, pretrained, trainer.checkpoints)


if __name__ == "__main__":
    main()
