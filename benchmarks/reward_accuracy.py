# SPDX-License-Identifier: Apache-2.0
"""What a reward model learns from real pairs: ours beside TRL's trainer, from the same weights in the same order.

`python -m benchmarks.run hh` measures it. NEMO_ALIGNER_TEST_DATA names a folder with hh_harmless.jsonl.gz, rows of
Anthropic's HH-RLHF.
"""

import json
import math
import os
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks.figures import Figure, Part
from benchmarks.processes import PEERS_PYTHON, ROOT, conditions, measure

__all__ = ["DATA", "MODEL", "accuracy", "difference", "export_hf", "import_hf", "interval", "part"]

DATA, FILE = "NEMO_ALIGNER_TEST_DATA", "hh_harmless.jsonl.gz"
MODEL = ROOT / ".cache/SmolLM2-135M-Instruct.Q4_1.gguf"
SCRIPTS = ROOT / "examples/nlp"
PEER = ROOT / "benchmarks/trl_reward_accuracy.py"
TRAINING, VALIDATION, STEP, MICRO_BATCH = 512, 256, 8, 4  # pairs
MAX_TOKENS = 256
LEARNING_RATE = 2e-5
SEEDS = (1, 2)
OURS, TRL = "NeMo-Aligner", "TRL"
TABLE = "After one pass"

Rewards = list[tuple[float, float]]  # of chosen and rejected


def part() -> Part:
    """Both sides with each seed, which draws the head and the order."""
    found: dict[str, list[Rewards]] = {OURS: [], TRL: []}
    with tempfile.TemporaryDirectory(prefix="nemo_aligner_hh_") as scratch:
        folder = Path(scratch)
        import_hf(MODEL, folder / "base.nemo")
        export_hf(folder / "base.nemo", folder / "base")
        training, validation = _pairs(folder)
        _write(folder / "validation.jsonl", validation)
        for seed in SEEDS:
            one = folder / str(seed)
            _peer("head", folder / "base", one / "start", seed)
            _write(one / "pairs.jsonl", random.Random(seed).sample(training, k=TRAINING))
            _train_ours(one, folder / "validation.jsonl")
            _peer("train", one / "start", one / "pairs.jsonl", one / TRL, json.dumps(_TRL_SETTINGS))
            for side, rewards in found.items():
                rewards.append(json.loads(_peer("score", one / side, folder / "validation.jsonl")))
                print(f"hh: seed {seed}: {side} {accuracy(rewards[-1]):.3f}", flush=True)
    return Part(
        title="A reward model's accuracy",
        about=ABOUT,
        conditions=conditions(),
        figures=(
            *(_accuracies(side, rewards) for side, rewards in found.items()),
            *_differences(found[OURS], found[TRL]),
        ),
    )


ABOUT = f"""\
SmolLM2-135M-Instruct with a random scalar head learns from {TRAINING} pairs of Anthropic's HH-RLHF (harmless) of at
most {MAX_TOKENS} tokens, {STEP} pairs a step, AdamW at {LEARNING_RATE:g}, in fp32; then {VALIDATION} other pairs are
scored by transformers, one text at a time. TRL 1.16.0's RewardTrainer starts from the same weights and sees the same
order; a seed draws the head and the order. The interval is of the paired difference over all seeds' validation pairs.
"""

_TRL_SETTINGS = {
    "per_device_train_batch_size": MICRO_BATCH,
    "gradient_accumulation_steps": STEP // MICRO_BATCH,
    "learning_rate": LEARNING_RATE,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "max_length": MAX_TOKENS,
}


def accuracy(rewards: Rewards) -> float:
    """The share of pairs whose chosen text has the higher reward.

    >>> accuracy([(1.0, 0.0), (0.0, 1.0), (2.0, 1.0), (1.0, 1.0)])
    0.5
    """
    return statistics.mean(chosen > rejected for chosen, rejected in rewards)


def difference(ours: Rewards, peers: Rewards) -> tuple[float, float]:
    """How much more often ours is right on the same pairs, and half the width of the 95 % interval.

    >>> difference([(1.0, 0.0), (1.0, 0.0)] * 50, [(1.0, 0.0), (0.0, 1.0)] * 50)
    (0.5, 0.0985)
    """
    by_pair = [(a > b) - (c > d) for (a, b), (c, d) in zip(ours, peers, strict=True)]
    mean, half = interval(by_pair)
    return mean, round(half, 4)


def interval(numbers: Sequence[float]) -> tuple[float, float]:
    """Their mean, and half the width of its 95 % interval.

    >>> interval([1.0, -1.0] * 50)[0]
    0.0
    """
    return statistics.mean(numbers), 1.96 * statistics.stdev(numbers) / math.sqrt(len(numbers))


def _accuracies(side: str, rewards: Sequence[Rewards]) -> Figure:
    return Figure(
        table=TABLE,
        subject=side,
        metric="validation accuracy",
        values=tuple(accuracy(one) for one in rewards),
    )


def _differences(ours: Sequence[Rewards], peers: Sequence[Rewards]) -> tuple[Figure, Figure]:
    mean, half = difference([pair for one in ours for pair in one], [pair for one in peers for pair in one])
    subject = f"{OURS} - {TRL}"
    return (
        Figure(table=TABLE, subject=subject, metric="validation accuracy", values=(mean,)),
        Figure(table=TABLE, subject=subject, metric="95 % interval, half its width", values=(half,)),
    )


def _pairs(folder: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Pairs that are short enough, first those to learn from, then others; as the product's script makes them."""
    data = os.environ.get(DATA)
    if data is None or not (Path(data) / FILE).is_file():
        sys.exit(f"{DATA}={data} names no folder with {FILE}\nFix: {DATA}=FOLDER make bench ONLY=hh")
    (folder / "raw").mkdir()
    shutil.copy(Path(data) / FILE, folder / "raw")
    script = SCRIPTS / "data/anthropic_hh/download_and_process.py"
    measure((str(script), "--input-dir", str(folder / "raw"), "--output-dir", str(folder)))
    tokenizer = Tokenizer.from_file(str(folder / "base/tokenizer.json"))

    def short(name: str) -> list[tuple[str, str]]:
        lines = (folder / f"{name}_comparisons.jsonl").read_bytes().splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        lengths = [len(row.ids) + 1 for row in tokenizer.encode_batch(texts)]  # and EOS
        return [
            (texts[i], texts[i + 1]) for i in range(0, len(texts), 2) if max(lengths[i : i + 2]) <= MAX_TOKENS
        ]

    pairs = short("train") + short("test")
    assert len(pairs) >= TRAINING + VALIDATION, len(pairs)
    return pairs[:TRAINING], pairs[-VALIDATION:]


def _write(path: Path, pairs: Sequence[tuple[str, str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        "".join(json.dumps({"text": text}) + "\n" for pair in pairs for text in pair), encoding="utf-8"
    )


def import_hf(source: Path, nemo: Path) -> None:
    """Make a .nemo of a Hugging Face folder or a GGUF file."""
    measure((str(SCRIPTS / "gpt/import_hf.py"), "--in-file", str(source), "--out-file", str(nemo)))


def export_hf(nemo: Path, folder: Path) -> None:
    """Make a Hugging Face folder of a .nemo."""
    measure((str(SCRIPTS / "gpt/export_hf.py"), "--in-file", str(nemo), "--out-file", str(folder)))


def _train_ours(folder: Path, validation: Path) -> None:
    """From folder/start and folder/pairs.jsonl to folder/OURS."""
    import_hf(folder / "start", folder / "start.nemo")
    train = folder / "pairs.jsonl"
    measure(
        (
            str(SCRIPTS / "gpt/train_reward_model.py"),
            f"pretrained_checkpoint.restore_from_path={folder / 'start.nemo'}",
            f"model.data.data_prefix={{train: [{train}], validation: [{validation}], test: [{validation}]}}",
            "trainer.precision=32",
            "trainer.rm.train_random_sampler=False",
            "trainer.rm.val_check_interval=0",
            "model.data.append_eod=True",
            f"model.encoder_seq_length={MAX_TOKENS}",
            f"model.micro_batch_size={MICRO_BATCH}",
            f"model.global_batch_size={STEP}",
            f"model.optim.lr={LEARNING_RATE}",
            "model.optim.weight_decay=0.0",
            "model.optim.betas=[0.9,0.999]",
            "model.optim.sched.name=constant",
            "model.optim.sched.warmup_steps=0",
            "exp_manager.create_checkpoint_callback=False",
            f"exp_manager.explicit_log_dir={folder / 'run'}",
        )
    )
    export_hf(folder / "run/checkpoints/megatron_gpt.nemo", folder / OURS)


def _peer(*words: object) -> str:
    return measure((str(PEER), *map(str, words)), python=PEERS_PYTHON, allocator="keeping allocator")
