# SPDX-License-Identifier: Apache-2.0
"""Online DPO: a language model learns to prefer its own best responses to its own worst ones.

python examples/nlp/gpt/train_gpt_online_dpo.py pretrained_checkpoint.restore_from_path=sft.nemo \
    "model.data.data_prefix={train: [prompts.jsonl]}" trainer.ppo.rewards.rule.function=my_rewards.score
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from nemo_aligner.bounds import bounded, only
from nemo_aligner.config import ppo
from nemo_aligner.launch.script import script
from nemo_aligner.models.gpt.learning_rate import OptimConfig, SchedConfig
from nemo_aligner.objectives.config import DPOConfig

_NO_RATIO = "a loss by ratios, which pairs lack,"


@dataclass(frozen=True, kw_only=True)
class OnlineDPOSettings(DPOConfig):
    ref_policy_kl_penalty: float = 0.1
    # initial: the model as training began (online DPO); rollout: the model that wrote the responses (iterative DPO),
    # which takes no second set of weights
    reference: Literal["initial", "rollout"] = "initial"


@dataclass(frozen=True, kw_only=True)
class OnlineDPOConfig(ppo.ActorConfig):
    advantage_estimator: str | None = only(None, what="an estimator of advantages")  # only null
    initial_policy_kl_penalty: float = 0.0  # only 0: the reference of model.dpo holds the policy
    mask_unfinished: bool = False  # responses that the length limit cut are in no pair


@dataclass(frozen=True, kw_only=True)
class OnlineDPOTrainerConfig(ppo.ActorTrainerConfig):
    ppo: OnlineDPOConfig = field(default_factory=OnlineDPOConfig)


@dataclass(frozen=True, kw_only=True)
class OnlineDPORolloutConfig(ppo.ActorRolloutConfig):
    num_rollout_samples: int = 64
    # of which the best and the worst are a pair
    num_responses_per_prompt: int = bounded(4, at_least=2)
    policy_loss: str = only("ppo", what=_NO_RATIO)  # only ppo
    ratio_eps: float = only(0.2, what=_NO_RATIO)  # only 0.2
    ratio_eps_high: float | None = only(None, what=_NO_RATIO)  # only null
    dual_clip: float | None = only(None, what=_NO_RATIO)  # only null
    loss_mean: str = only("token", what=_NO_RATIO)  # only token
    entropy_bonus: float = only(0.0, what="a bonus beside the loss of pairs")  # only 0
    rollout_micro_batch_size: int = 32


@dataclass(frozen=True, kw_only=True)
class OnlineDPOModelConfig(ppo.ActorModelConfig):
    global_batch_size: int = 16  # pairs of one optimizer step over all ranks
    ppo: OnlineDPORolloutConfig = field(default_factory=OnlineDPORolloutConfig)
    dpo: OnlineDPOSettings = field(default_factory=OnlineDPOSettings)  # the loss
    optim: OptimConfig = field(
        default_factory=partial(OptimConfig, lr=5e-7, weight_decay=0.1, sched=SchedConfig(name="constant"))
    )


@dataclass(frozen=True, kw_only=True)
class OnlineDPOJob(ppo.CriticFreeJob):
    model: OnlineDPOModelConfig
    trainer: OnlineDPOTrainerConfig = field(default_factory=OnlineDPOTrainerConfig)
    name: str = "megatron_gpt_online_dpo"

    @property
    def asks_initial_policy(self) -> bool:
        """See ActorJob."""
        return self.model.dpo.has_reference and self.model.dpo.reference == "initial"

    @property
    def rollout_rows(self) -> tuple[int, str]:
        """See ActorJob."""
        return self.model.ppo.num_prompts, "pairs"


@script("gpt_online_dpo", OnlineDPOJob)
def main(job: OnlineDPOJob) -> None:
    """Have a language model prefer its best responses to its worst."""
    from nemo_aligner.builders.actor import train_actor
    from nemo_aligner.objectives.preference import DPO
    from nemo_aligner.objectives.rollout_pairs import rollout_pairs

    initial, unfinished = job.model.dpo.reference == "initial", job.trainer.ppo.mask_unfinished
    pairs = partial(rollout_pairs, initial=initial, mask_unfinished=unfinished)
    train_actor(job, loss=DPO(job.model.dpo), pairs=pairs)


if __name__ == "__main__":
    main()
