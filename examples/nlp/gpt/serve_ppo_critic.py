# SPDX-License-Identifier: Apache-2.0
"""The critic's job of PPO: serves values, and rewards beside them, over PyTriton, and learns from what it is sent.

python examples/nlp/gpt/serve_ppo_critic.py pretrained_checkpoint.restore_from_path=megatron_gpt.nemo
"""

from nemo_aligner.config.serve import CriticJob
from nemo_aligner.launch.script import script


@script("gpt_ppo_critic", CriticJob)
def main(job: CriticJob) -> None:
    """Serve a critic until its actor ends."""
    from nemo_aligner import builders
    from nemo_aligner.algorithms.critic_server_trainer import CriticServerTrainer
    from nemo_aligner.builders import servers
    from nemo_aligner.objectives.value import ValueLoss

    with builders.open_experiment(job) as run:
        start = builders.resume_point(job, run)
        critic = servers.load_critic(job)
        checkpoints, load = servers.critic_checkpoints(job, run, critic)
        if start is not None:
            load(start)
        CriticServerTrainer(
            servers.critic_config(job, critic),
            critic.learner,
            ValueLoss(job.model),
            run,
            checkpoints,
            load=load,
            start=start,
        ).run_server(servers.critic_server(job, critic))
        builders.save_result(job, run, critic, checkpoints)


if __name__ == "__main__":
    main()
