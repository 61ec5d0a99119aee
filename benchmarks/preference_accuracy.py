# SPDX-License-Identifier: Apache-2.0
"""What DPO learns from real pairs: ours beside TRL's trainer, from the same weights in the same order.

`python -m benchmarks.run hh_dpo` measures it. NEMO_ALIGNER_TEST_DATA names a folder with hh_harmless.jsonl.gz, rows of
Anthropic's HH-RLHF. What is interrupted goes on: runs whose rewards stand in preference_accuracy.json are not repeated.
"""

import json
import random
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.figures import Figure, Part
from benchmarks.learning.data import harmless_pairs
from benchmarks.processes import PEERS_PYTHON, ROOT, conditions, measure
from benchmarks.reward_accuracy import (
    MODEL,
    SCRIPTS,
    Rewards,
    accuracy,
    difference,
    export_hf,
    import_hf,
    interval,
)

__all__ = ["margin", "part"]

PEER = ROOT / "benchmarks/trl_preference_accuracy.py"
RUNS = ROOT / "results/preference_accuracy"
KNOWN = ROOT / "benchmarks/preference_accuracy.json"
TRAINING, VALIDATION, STEP, MICRO_BATCH = 256, 128, 4, 4  # pairs
MOST_CHARACTERS = 300  # of prompt and response together
MAX_TOKENS = 256  # which no such text has
BETA = 0.1
LEARNING_RATES = {"all weights": 5e-6, "LoRA": 1e-4}
RANK, ALPHA = 16, 32
SEEDS = (1, 2, 3)
OURS, TRL = "NeMo-Aligner", "TRL"


def part() -> Part:
    """Both sides with each seed, which draws the order and the adapters."""
    RUNS.mkdir(parents=True, exist_ok=True)
    _unless_there(RUNS / "base.nemo", lambda path: import_hf(MODEL, path))
    _unless_there(RUNS / "base", lambda path: export_hf(RUNS / "base.nemo", path))
    pairs = [row for row in harmless_pairs() if _characters(row) <= MOST_CHARACTERS]
    assert len(pairs) >= TRAINING + VALIDATION, len(pairs)
    _write(RUNS / "validation.jsonl", pairs[-VALIDATION:])
    figures: list[Figure] = []
    for scheme in LEARNING_RATES:
        found: dict[str, list[Rewards]] = {OURS: [], TRL: []}
        for seed in SEEDS:
            folder = RUNS / scheme / str(seed)
            folder.mkdir(parents=True, exist_ok=True)
            drawn = random.Random(seed).sample(pairs[:-VALIDATION], k=TRAINING)
            _write(folder / "pairs.jsonl", drawn)
            for side in found:
                found[side].append(rewards := _rewards(side, folder, scheme, seed))
                print(
                    f"hh_dpo: {scheme}, seed {seed}: {side} {accuracy(rewards):.3f}, {margin(rewards):.4f}",
                    flush=True,
                )
        figures += _figures(f"DPO of {scheme}", found)
    return Part(
        title="DPO's accuracy and margin", about=ABOUT, conditions=conditions(), figures=tuple(figures)
    )


ABOUT = f"""\
SmolLM2-135M-Instruct learns from {TRAINING} pairs of Anthropic's HH-RLHF (harmless) of at most {MOST_CHARACTERS}
characters, {STEP} pairs a step, DPO with beta {BETA:g}, AdamW, in fp32: all weights at
{LEARNING_RATES["all weights"]:g}, or adapters of rank {RANK} on all linear layers at {LEARNING_RATES["LoRA"]:g}. Then
transformers gives the log-probs of {VALIDATION} other pairs, one text at a time. The accuracy is the share of pairs
whose chosen response has the higher implicit reward, beta (log p - log p_ref), the margin the mean difference of the
two. TRL 1.16.0's DPOTrainer starts from the same weights and adapters and sees the same order; a seed draws the order
and the adapters. The intervals are of the paired differences over all seeds' validation pairs.
"""


def margin(rewards: Rewards) -> float:
    """The mean of the chosen responses' rewards less the rejected ones'.

    >>> margin([(1.0, 0.0), (0.0, 0.5)])
    0.25
    """
    return statistics.mean(chosen - rejected for chosen, rejected in rewards)


def _characters(row: dict[str, str]) -> int:
    return len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"]))


def _figures(table: str, found: dict[str, list[Rewards]]) -> list[Figure]:
    figures = [
        Figure(table=table, subject=side, metric=metric, values=tuple(map(of, rewards)))
        for metric, of in (("validation accuracy", accuracy), ("validation margin", margin))
        for side, rewards in found.items()
    ]
    ours, peers = ([pair for one in found[side] for pair in one] for side in (OURS, TRL))
    apart = [(a - b) - (c - d) for (a, b), (c, d) in zip(ours, peers, strict=True)]
    for metric, (mean, half) in (("accuracy", difference(ours, peers)), ("margin", interval(apart))):
        for name, value in (
            (f"validation {metric}", mean),
            (f"95 % interval of the {metric}, half its width", half),
        ):
            figures.append(Figure(table=table, subject=f"{OURS} - {TRL}", metric=name, values=(value,)))
    return figures


def _rewards(side: str, folder: Path, scheme: str, seed: int) -> Rewards:
    """Those of a side's model, which is trained unless its rewards are known."""
    known = json.loads(KNOWN.read_text()) if KNOWN.exists() else {}
    run = f"{scheme}, seed {seed}, {side}"
    if run not in known:
        model = (_train_ours if side == OURS else _train_trl)(folder, scheme, seed)
        scored = json.loads(_peer("score", model, RUNS / "base", RUNS / "validation.jsonl", BETA))
        shutil.rmtree(model)
        known[run] = [[round(reward, 7) for reward in pair] for pair in scored]
        lines = (f"{json.dumps(name)}: {json.dumps(rewards)}" for name, rewards in sorted(known.items()))
        KNOWN.write_text("{" + ",\n".join(lines) + "}\n")
    return [(chosen, rejected) for chosen, rejected in known[run]]


def _unless_there(path: Path, make: Callable[[Path], object]) -> None:
    if not path.exists():
        unfinished = path.with_name(f"unfinished_{path.name}")
        make(unfinished)
        unfinished.rename(path)


def _write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _adapters(folder: Path, seed: int) -> Path:
    path = folder / "adapters"
    _unless_there(path, lambda out: _peer("adapters", RUNS / "base", out, seed, RANK, ALPHA))
    return path


def _train_ours(folder: Path, scheme: str, seed: int) -> Path:
    lora = []
    if scheme == "LoRA":
        lora = [
            "model.peft.peft_scheme=lora",
            f"model.peft.restore_from_path={_adapters(folder, seed)}",
            "model.peft.lora_tuning.target_modules=[all]",
            f"model.peft.lora_tuning.adapter_dim={RANK}",
            f"model.peft.lora_tuning.alpha={ALPHA}",
            "model.peft.lora_tuning.adapter_dropout=0.0",
        ]
    train, validation = folder / "pairs.jsonl", RUNS / "validation.jsonl"
    measure(
        (
            str(SCRIPTS / "gpt/train_gpt_dpo.py"),
            f"pretrained_checkpoint.restore_from_path={RUNS / 'base.nemo'}",
            f"model.data.data_prefix={{train: [{train}], validation: [{validation}], test: [{validation}]}}",
            "trainer.precision=32",
            "trainer.dpo.train_random_sampler=False",
            "trainer.dpo.val_check_interval=0",
            f"model.dpo.ref_policy_kl_penalty={BETA}",
            f"model.encoder_seq_length={MAX_TOKENS}",
            f"model.micro_batch_size={MICRO_BATCH}",
            f"model.global_batch_size={STEP}",
            f"model.optim.lr={LEARNING_RATES[scheme]}",
            "model.optim.weight_decay=0.0",
            "model.optim.betas=[0.9,0.999]",
            "model.optim.sched.name=constant",
            "model.optim.sched.warmup_steps=0",
            "exp_manager.create_checkpoint_callback=False",
            f"exp_manager.explicit_log_dir={folder / 'run'}",
            *lora,
        )
    )
    export_hf(folder / "run/checkpoints/megatron_gpt.nemo", folder / OURS)
    return folder / OURS


def _train_trl(folder: Path, scheme: str, seed: int) -> Path:
    settings = {
        "beta": BETA,
        "per_device_train_batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": STEP // MICRO_BATCH,
        "learning_rate": LEARNING_RATES[scheme],
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "max_length": MAX_TOKENS,
    }
    adapters = [_adapters(folder, seed)] if scheme == "LoRA" else []
    _peer("train", RUNS / "base", folder / "pairs.jsonl", folder / TRL, json.dumps(settings), *adapters)
    return folder / TRL


def _peer(*words: object) -> str:
    return measure((str(PEER), *map(str, words)), python=PEERS_PYTHON, allocator="keeping allocator")
