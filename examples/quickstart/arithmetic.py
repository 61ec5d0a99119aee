# SPDX-License-Identifier: Apache-2.0
"""GRPO with a rule: a model that was fine-tuned on unreliable sums learns which of its responses are right.

    python -m examples.quickstart.arithmetic --seed 1

A small Llama is made and fine-tuned on sums of which three in four are wrong; then GRPO samples sixteen
responses to each sum and rewards those that `right` below accepts. It never sees a correct sum again.
"""

import argparse
import json
import random
from pathlib import Path

from examples.quickstart.base_model import write_base_model
from examples.quickstart.stages import ROOT, Stages, metric, new_folder, run

LARGEST = 9
RIGHT = 0.25  # share of the sums
EXAMPLES = 256  # of each sum
TRAINING = (
    "trainer.precision=32",
    "exp_manager.create_tensorboard_logger=False",
    "exp_manager.create_checkpoint_callback=False",
    "model.encoder_seq_length=32",
)
SFT = (
    "model.optim.lr=2e-3",
    "model.optim.sched.warmup_steps=20",
    "model.optim.sched.constant_steps=0",
    "model.data.train_ds.micro_batch_size=128",
    "model.data.train_ds.global_batch_size=128",
    "model.data.train_ds.prompt_template={input}{output}",
    "trainer.sft.val_check_interval=0",
    "trainer.sft.max_epochs=4",
)
GRPO = (
    "model.optim.lr=6e-4",
    "model.optim.sched.warmup_steps=5",
    "model.optim.sched.name=CosineAnnealing",
    "model.optim.sched.constant_steps=0",
    "model.optim.sched.min_lr=2e-5",
    "trainer.ppo.initial_policy_kl_penalty=0",
    "trainer.ppo.max_steps=180",
    "trainer.ppo.max_epochs=100",
    "trainer.ppo.val_check_interval=20",
    "model.ppo.num_rollout_samples=512",
    "model.ppo.num_responses_per_prompt=16",
    "model.ppo.entropy_bonus=0.02",
    "model.ppo.rollout_micro_batch_size=512",
    "model.ppo.num_val_samples=100",
    "model.ppo.val_rollout_micro_batch_size=100",
    "model.ppo.length_params.max_length=4",
    "model.ppo.sampling_params.end_strings=[]",
    "model.global_batch_size=256",
    "model.micro_batch_size=128",
)


def right(response: str, row: dict[str, str], **_: object) -> float:
    """1 for the sum, 0 for anything else: the rule that rewards."""
    return float(response.strip() == row["sum"])


def write_rows(folder: Path, *, seed: int) -> None:
    """Write the unreliable sums to train on, and the questions."""
    draw = random.Random(seed)
    sums = [(f"{a}+{b}=", a + b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    unreliable = []
    for question, target in sums:
        for _ in range(EXAMPLES):
            wrong = draw.choice([n for n in range(2 * LARGEST + 1) if n != target])
            unreliable.append({"input": question, "output": str(target if draw.random() < RIGHT else wrong)})
    draw.shuffle(unreliable)
    asked = [{"prompt": question, "sum": str(target)} for question, target in sums]
    for name, rows in (("unreliable", unreliable), ("asked", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Make the model, fine-tune it, have it learn from the rule, and say how often it was right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=ROOT / "results/quickstart-grpo")
    options = parser.parse_args()
    stages, folder = Stages(3), new_folder(options.results)
    stages.next("A model with random weights, and sums of which three in four are wrong")
    write_rows(folder, seed=options.seed)
    write_base_model([], folder / "base")  # of no texts: a token is a byte
    stages.next("Fine-tune it on them")
    run(
        "train_gpt_sft.py",
        f"model.restore_from_path={folder / 'base'}",
        f"model.data.train_ds.file_path={folder / 'unreliable.jsonl'}",
        f"exp_manager.explicit_log_dir={folder / 'sft'}",
        f"model.seed={options.seed}",
        *TRAINING,
        *SFT,
    )
    stages.next("GRPO: sixteen responses to each sum, rewarded by a rule of one line")
    run(
        "train_gpt_grpo.py",
        f"pretrained_checkpoint.restore_from_path={folder / 'sft/checkpoints/megatron_gpt_sft.nemo'}",
        f"model.data.data_prefix={{train: [{folder / 'asked.jsonl'}], validation: [{folder / 'asked.jsonl'}]}}",
        "trainer.ppo.rewards.right.function=examples.quickstart.arithmetic.right",
        f"exp_manager.explicit_log_dir={folder / 'grpo'}",
        f"model.seed={options.seed}",
        *TRAINING,
        *GRPO,
    )
    lines = [json.loads(line) for line in (folder / "grpo/metrics.jsonl").read_text().splitlines()]
    _, before = metric(lines, "train_rollouts/rewards")
    steps, after = metric(lines, "val_rollouts/rewards")
    for step, share in zip([0, *steps], [before[0], *after], strict=True):
        print(f"after {step:>3.0f} steps: {share:.1%} of the responses are right")
    print(f"done in {stages.seconds:.0f} s; results are in {folder}")


if __name__ == "__main__":
    main()
