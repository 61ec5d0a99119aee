# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning with the settings of NeMo RL: examples/configs/sft.yaml; docs/nemo_rl.md has the keys.

python examples/run_sft.py policy.model_name=meta-llama/Meta-Llama-3-8B cluster.gpus_per_node=8
"""

from pathlib import Path

from nemo_aligner.launch.nemo_rl import run

if __name__ == "__main__":
    run("sft", Path(__file__).parent / "configs")
