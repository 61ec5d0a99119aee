# SPDX-License-Identifier: Apache-2.0
"""Serves a reward model over PyTriton, until SIGTERM, Ctrl-C or a client's request ends it.

python examples/nlp/gpt/serve_reward_model.py rm_model_file=megatron_gpt.nemo
"""

from nemo_aligner.config.serve import RewardServerJob
from nemo_aligner.launch.script import script


@script("inference_rm", RewardServerJob)
def main(job: RewardServerJob) -> None:
    """Serve the rewards of texts."""
    from nemo_aligner.algorithms.reward_server import RewardModelServer
    from nemo_aligner.builders import servers

    pretrained = servers.load_served_reward_model(job)
    RewardModelServer(
        model=pretrained.learner,
        name=job.inference.model_name,
        limits=servers.served_limits(job.model, pretrained),
        rows=job.rows,
        multiple=job.model.length_multiple,
        settings=servers.reward_settings(job, pretrained),
    ).run_server(servers.reward_server(job, pretrained))


if __name__ == "__main__":
    main()
