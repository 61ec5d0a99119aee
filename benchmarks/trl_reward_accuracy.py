# SPDX-License-Identifier: Apache-2.0
"""The parts of benchmarks/reward_accuracy.py that run in TRL's environment; it imports nothing of ours.

python trl_reward_accuracy.py head MODEL OUT SEED                 MODEL with a random scalar head
python trl_reward_accuracy.py train MODEL PAIRS.jsonl OUT JSON    one pass of TRL's RewardTrainer with these settings
python trl_reward_accuracy.py score MODEL PAIRS.jsonl             transformers' rewards, [[chosen, rejected], ...]
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging


def load(folder: str) -> tuple:
    """The sequence classifier of one label in ``folder``, in fp32, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # A text ends with EOS, where its reward is read; padded with EOS, it would be read there too.
    tokenizer.pad_token = "<|im_start|>"
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def head(folder: str, out: str, seed: str) -> None:
    """Save the model with a head that transformers draws."""
    torch.manual_seed(int(seed))
    model, tokenizer = load(folder)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def rows(path: str) -> list[dict[str, str]]:
    """Pairs of whole texts, out of lines that alternate."""
    texts = [json.loads(line)["text"] for line in Path(path).read_bytes().splitlines()]
    return [
        {"chosen": chosen, "rejected": rejected}
        for chosen, rejected in zip(texts[::2], texts[1::2], strict=True)
    ]


def train(folder: str, pairs: str, out: str, settings: str) -> None:
    """TRL's trainer, on the pairs in the order of their file."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports] - of TRL's environment
    from trl import RewardConfig, RewardTrainer  # pyright: ignore[reportMissingImports]

    model, tokenizer = load(folder)
    config = RewardConfig(
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
    trainer = RewardTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(rows(pairs)), processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model(out)


@torch.no_grad()
def score(folder: str, pairs: str) -> None:
    """Print both rewards of each pair, one text at a time: no padding."""
    model, tokenizer = load(folder)
    model.eval()

    def reward(text: str) -> float:
        ids = tokenizer(text + tokenizer.eos_token, return_tensors="pt")
        return float(model(**ids).logits)

    print(json.dumps([[reward(row["chosen"]), reward(row["rejected"])] for row in rows(pairs)]))


if __name__ == "__main__":
    logging.disable_progress_bar()
    {"head": head, "train": train, "score": score}[sys.argv[1]](*sys.argv[2:])
