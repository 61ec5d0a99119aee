# SPDX-License-Identifier: Apache-2.0
"""Starts the jobs of a PPO run on this machine, and ends them together.

python examples/nlp/gpt/run_ppo.py critic.pretrained_checkpoint.restore_from_path=rm.nemo \
    actor.pretrained_checkpoint.restore_from_path=sft.nemo \
    "actor.model.data.data_prefix={train: [train.jsonl], validation: [test.jsonl], test: [test.jsonl]}"

critic.KEY=VALUE is a setting of serve_ppo_critic.py, actor.KEY=VALUE one of train_gpt_ppo_actor.py. With
reward.rm_model_file=FILE the reward model has a job of its own, serve_reward_model.py, whose settings are
reward.KEY=VALUE. A key in capitals is an environment variable of the job, as in critic.CUDA_VISIBLE_DEVICES=4,5,6,7.

A port that is not given is a free one, and goes to both sides. What a job prints goes on to this terminal, behind the
job's name, and to output.log in the job's folder: exp_manager.explicit_log_dir, or critic and reward within the
actor's folder. One job's bad end ends the others. Ctrl-C ends all within seconds; SIGTERM has the actor save and end,
then the critic, and a second one does not wait. The same command goes on from there where
actor.exp_manager.explicit_log_dir names the folder.

On a CPU, jobs that train adapters (model.peft) share one copy of the weights that they have frozen alike.
"""

import sys
from pathlib import Path

from nemo_aligner.launch.cli import run_cli
from nemo_aligner.launch.job_group import run_job_group
from nemo_aligner.launch.ppo_jobs import plan_jobs
from nemo_aligner.launch.shared_folder import shared_folder


def main() -> None:
    """Run PPO."""
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
        return
    actor, servers = plan_jobs(words, Path(__file__).resolve().parent)
    with shared_folder():
        sys.exit(run_job_group(actor, servers))


if __name__ == "__main__":
    run_cli(main)
