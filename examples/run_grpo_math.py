# SPDX-License-Identifier: Apache-2.0
"""GRPO on math problems with the settings of NeMo RL: examples/configs/grpo_math_1B.yaml; docs/nemo_rl.md has the keys.

python examples/run_grpo_math.py policy.model_name=Qwen/Qwen2-1.5B cluster.gpus_per_node=8
"""

from pathlib import Path

from nemo_aligner.launch.nemo_rl import run

if __name__ == "__main__":
    run("grpo", Path(__file__).parent / "configs")
