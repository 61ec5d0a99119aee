# SPDX-License-Identifier: Apache-2.0
"""TRL's side of first_step.py: the same model and rows, by TRL's SFTTrainer, in the peers' environment.

    python trl_first_step.py MODEL_FOLDER ROWS.jsonl

Prints the time of the first step's end.
"""

import sys
import time

from datasets import load_dataset  # pyright: ignore[reportMissingImports] - of the peers' environment
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]


class Clock(TrainerCallback):
    """Tells when the first step has ended."""

    def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:  # noqa: ARG002 - TRL's
        """Print the time."""
        print(f"FIRST_STEP {time.time()}", flush=True)


def main() -> None:
    """Train one step."""
    model, rows = sys.argv[1:]
    settings = SFTConfig(
        output_dir="out",
        max_steps=1,
        per_device_train_batch_size=8,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=settings,
        train_dataset=load_dataset("json", data_files=rows, split="train"),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[Clock()],
    ).train()


if __name__ == "__main__":
    main()
