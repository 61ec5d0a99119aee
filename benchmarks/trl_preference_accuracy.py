# SPDX-License-Identifier: Apache-2.0
"""The parts of benchmarks/preference_accuracy.py that run in TRL's environment; it imports nothing of ours.

python trl_preference_accuracy.py adapters MODEL OUT SEED RANK ALPHA          PEFT's adapters of all linear layers
python trl_preference_accuracy.py train MODEL PAIRS.jsonl OUT JSON [ADAPTERS] one pass of TRL's DPOTrainer
python trl_preference_accuracy.py score MODEL REFERENCE PAIRS.jsonl BETA      transformers' rewards, in pairs
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def load(folder: str) -> tuple:
    """The language model in ``folder``, in fp32, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer


def rows(path: str) -> list[dict[str, str]]:
    """Pairs of responses to a prompt."""
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def adapters(folder: str, out: str, seed: str, rank: str, alpha: str) -> None:
    """Save adapters that PEFT draws."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(int(seed))
    config = LoraConfig(
        r=int(rank), lora_alpha=int(alpha), target_modules="all-linear", task_type="CAUSAL_LM"
    )
    get_peft_model(load(folder)[0], config).save_pretrained(out)


def train(folder: str, pairs: str, out: str, settings: str, adapters: str | None = None) -> None:
    """TRL's trainer, on the pairs in the order of their file; the adapters are merged at the end."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports] - of TRL's environment
    from peft import PeftModel
    from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportMissingImports]

    model, tokenizer = load(folder)
    if adapters is not None:
        model = PeftModel.from_pretrained(model, adapters, is_trainable=True)
    config = DPOConfig(
        **json.loads(settings),
        output_dir=out,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_steps=8,
        disable_tqdm=True,
    )
    reference = None if adapters is not None else load(folder)[0]
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=config,
        train_dataset=Dataset.from_list(rows(pairs)),
        processing_class=tokenizer,
    )
    trainer.train()
    if adapters is not None:
        model = trainer.model.merge_and_unload()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@torch.no_grad()
def score(folder: str, reference: str, pairs: str, beta: str) -> None:
    """Print both implicit rewards of each pair, one text at a time: no padding."""
    (policy, tokenizer), (base, _) = load(folder), load(reference)

    def reward(prompt: str, response: str) -> float:
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([tokenizer(prompt + response)["input_ids"] + [tokenizer.eos_token_id]])
        sums = []
        for model in (policy, base):
            logprobs = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
            sums.append(float(logprobs.gather(1, ids[0, start:, None]).sum()))
        return float(beta) * (sums[0] - sums[1])

    policy.eval()
    base.eval()
    sides = ("chosen", "rejected")
    print(json.dumps([[reward(row["prompt"], row[side]) for side in sides] for row in rows(pairs)]))


if __name__ == "__main__":
    logging.disable_progress_bar()
    {"adapters": adapters, "train": train, "score": score}[sys.argv[1]](*sys.argv[2:])
