# SPDX-License-Identifier: Apache-2.0
"""Proximal Policy Optimization: the actor's job. serve_ppo_critic.py runs beside it; docs/RLHFTraining.md has both.

python examples/nlp/gpt/train_gpt_ppo_actor.py pretrained_checkpoint.restore_from_path=sft.nemo \
    "model.data.data_prefix={train: [train.jsonl], validation: [test.jsonl], test: [test.jsonl]}"
"""

from nemo_aligner.config.ppo import ActorJob
from nemo_aligner.launch.script import script


@script("gpt_ppo_actor", ActorJob)
def main(job: ActorJob) -> None:
    """Train a language model on the rewards that a reward model gives to its responses."""
    from nemo_aligner.builders.actor import train_actor

    train_actor(job)


if __name__ == "__main__":
    main()
