# SPDX-License-Identifier: Apache-2.0
"""TRL's side of lora_dpo.py: the pairs of peers/trl_dpo.py, the adapters of peers/trl_sft.py.

    python trl_lora_dpo.py

Prints a RESULT line.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "peers"))

import torch
import trl_common as peers  # pyright: ignore[reportMissingImports] - of the folder above
from datasets import Dataset  # pyright: ignore[reportMissingImports] - of the peers' environment
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportMissingImports]


def main() -> None:
    """Train adapters on random pairs."""
    draw = torch.Generator().manual_seed(0)
    prompt = peers.SEQ // 2

    def response() -> str:  # to which TRL appends the end token
        return " " + peers.text(peers.words(peers.SEQ - prompt - 1, draw))

    pairs = [
        {"prompt": peers.text(peers.words(prompt, draw)), "chosen": response(), "rejected": response()}
        for _ in range(peers.MB * (peers.WARM + peers.MEAS))
    ]
    tokens = 2 * peers.MB * peers.SEQ
    DPOTrainer(
        model=peers.causal(),
        args=peers.mk(DPOConfig, output_dir="bench_trl_out_lora_dpo", max_length=peers.SEQ, beta=0.1),
        train_dataset=Dataset.from_list(pairs),
        processing_class=peers.tokenizer(),
        peft_config=LoraConfig(
            r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
        ),
        callbacks=[peers.Timer("lora_dpo", tokens, "tokens = 8 pairs x 2 branches x 256")],
    ).train()


if __name__ == "__main__":
    main()
