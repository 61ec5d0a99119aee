# SPDX-License-Identifier: Apache-2.0
"""Fine-tune SmolLM2-135M-Instruct on a laptop CPU and see what changed: `make quickstart-sft`.

Each step is a command that anyone could type, printed before it runs. The data teaches one habit, that of
answering as the keeper of a lighthouse; the prompts shown at the end are not among it.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.table import Table

from examples.quickstart.stages import ROOT, Stages, metric, new_folder, run, terminal

DATA = ROOT / "examples/quickstart/data"
PROMPTS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "How do I plan a birthday party?",
    "What is a black hole?",
)
TRAINING = (
    "trainer.devices=1",
    "trainer.precision=32",
    "trainer.sft.max_epochs=2",
    "trainer.sft.val_check_interval=10",
    "model.encoder_seq_length=128",
    "model.data.chat=True",
    "model.data.chat_template=tokenizer",
    f"model.data.train_ds.file_path={DATA / 'train.jsonl'}",
    "model.data.train_ds.micro_batch_size=4",
    "model.data.train_ds.global_batch_size=8",
    f"model.data.validation_ds.file_path={DATA / 'validation.jsonl'}",
    "model.optim.lr=1e-4",
    "model.optim.sched.warmup_steps=4",
    "model.optim.sched.constant_steps=0",
    "model.optim.sched.min_lr=1e-5",
    "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=True",
    "exp_manager.create_checkpoint_callback=False",
)


def complete(folder: Path) -> list[str]:
    """Greedy responses to ``PROMPTS``, by transformers, from a Hugging Face folder."""
    # transformers takes seconds to import, and the first step should not wait for it.
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(  # pyright: ignore[reportAttributeAccessIssue] - typed without its mixin
        **inputs, max_new_tokens=40, do_sample=False
    )
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def plot(metrics: Path, image: Path) -> None:
    """Draw the training and validation loss of ``metrics.jsonl`` over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in metrics.read_bytes().split(b"\n") if line]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, style in (("train/loss", "-"), ("validation/loss", "o--")):
        axes.plot(*metric(lines, name), style, label=name)
    axes.set(
        xlabel="step", ylabel="loss per loss token", title="SmolLM2-135M-Instruct learns to keep the light"
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(image, dpi=120)


def show(before: list[str], after: list[str]) -> None:
    """Print the responses side by side."""
    table = Table("prompt", "before", "after", show_lines=True)
    for row in zip(PROMPTS, before, after, strict=True):
        table.add_row(*(text.strip() for text in row))
    terminal().print(table)


def main() -> None:
    """Import, complete, train, export, complete again, plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--results", type=Path, default=ROOT / "results/quickstart-sft")
    options = parser.parse_args()
    stages = Stages(6)
    folder = new_folder(options.results)
    start, tuned, exported = (
        folder / "smollm2.nemo",
        folder / "checkpoints/megatron_gpt_sft.nemo",
        folder / "huggingface",
    )
    stages.next("Import the model: GGUF to .nemo")
    run("import_hf.py", "--in-file", options.model, "--out-file", start)
    stages.next("Ask it four questions before training")
    with TemporaryDirectory(dir=folder) as scratch:
        run("export_hf.py", "--in-file", start, "--out-file", Path(scratch) / "before")
        before = complete(Path(scratch) / "before")
    stages.next("Fine-tune")
    run(
        "train_gpt_sft.py",
        f"model.restore_from_path={start}",
        *TRAINING,
        f"exp_manager.explicit_log_dir={folder}",
    )
    stages.next("Export: .nemo to a Hugging Face folder")
    run("export_hf.py", "--in-file", tuned, "--out-file", exported)
    stages.next("Ask again")
    show(before, complete(exported))
    stages.next("Plot the loss")
    plot(folder / "metrics.jsonl", folder / "loss.png")
    print(f".nemo:         {tuned}\nHugging Face:  {exported}\nloss:          {folder / 'loss.png'}")
    print(f"done in {stages.seconds:.0f} s")


if __name__ == "__main__":
    main()
