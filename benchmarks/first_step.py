# SPDX-License-Identifier: Apache-2.0
"""From the command to the first step of the smallest fine-tuning run: ours beside TRL's SFTTrainer."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Figure, Part, ratio
from benchmarks.processes import PEERS_PYTHON, ROOT, THREADS, conditions, environment

__all__ = ["part"]

REPEATS = 5
ROWS, BATCH = 32, 8
OURS, TRL = "NeMo-Aligner", "TRL"
SCRIPT = ROOT / "examples/nlp/gpt/train_gpt_sft.py"
FIRST_LINE, FIRST_STEP, CPU = (
    "seconds to the first line",
    "seconds to the first step",
    "CPU seconds of the run",
)


@dataclass(frozen=True, kw_only=True)
class Start:
    """How a run began, in seconds."""

    first_line: float
    first_step: float
    cpu: float  # of the whole run, which ends after that step

    @property
    def by_metric(self) -> dict[str, float]:
        """The same under the names of the page."""
        return {FIRST_LINE: self.first_line, FIRST_STEP: self.first_step, CPU: self.cpu}


def part() -> Part:
    """Both sides in turn."""
    found: dict[str, list[Start]] = {OURS: [], TRL: []}
    loads = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _write_model(folder / "hf")
        _write_rows(folder / "rows.jsonl")
        _run(
            [str(ROOT / "examples/nlp/gpt/import_hf.py"), "--in-file", "hf", "--out-file", "toy.nemo"], folder
        )
        for repeat in range(REPEATS):
            loads.append(f"{os.getloadavg()[0]:.2f}")
            found[OURS].append(_ours(folder, f"run{repeat}"))
            found[TRL].append(_trl(folder))
    by_name = {
        (side, metric): Figure(
            table="From the command",
            subject=side,
            metric=metric,
            values=tuple(s.by_metric[metric] for s in starts),
        )
        for side, starts in found.items()
        for metric in (FIRST_LINE, FIRST_STEP, CPU)
    }
    ratios = [
        ratio("Ratios", f"{OURS} / {TRL}", by_name[OURS, metric], by_name[TRL, metric])
        for metric in (FIRST_STEP, CPU)
    ]
    return Part(
        title="The first step",
        about=ABOUT,
        conditions=conditions() | {"repeats": str(REPEATS), "load averages before each": ", ".join(loads)},
        figures=(*by_name.values(), *ratios),
    )


ABOUT = f"""\
A Llama of 2 layers, hidden size 64 and 259 tokens learns {ROWS} rows of prompt and response in fp32, {BATCH} a step.
The clock starts with the process and stops at the end of the first optimizer step; the run ends there. Ours is
train_gpt_sft.py as anyone would call it; [trl_first_step.py](/benchmarks/trl_first_step.py) takes the same Hugging
Face folder and the same texts. The sides take turns.
"""


def _ours(folder: Path, name: str) -> Start:
    words = (
        "model.restore_from_path=toy.nemo",
        "model.data.train_ds.file_path=rows.jsonl",
        f"model.data.train_ds.micro_batch_size={BATCH}",
        f"model.data.train_ds.global_batch_size={BATCH}",
        "trainer.precision=32",
        "trainer.sft.max_steps=1",
        "exp_manager.create_checkpoint_callback=False",
        "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=False",
        "exp_manager.create_tensorboard_logger=False",
        f"exp_manager.explicit_log_dir={name}",
    )
    began, first_line, cpu, _ = _run([str(SCRIPT), *words], folder)
    (line,) = (folder / name / "metrics.jsonl").read_text().splitlines()
    return Start(first_line=first_line, first_step=json.loads(line)["time"] - began, cpu=cpu)


def _trl(folder: Path) -> Start:
    script = str(ROOT / "benchmarks/trl_first_step.py")
    began, first_line, cpu, lines = _run([script, "hf", "trl_rows.jsonl"], folder, python=PEERS_PYTHON)
    (told,) = (line for line in lines if line.startswith("FIRST_STEP "))
    return Start(first_line=first_line, first_step=float(told.split()[1]) - began, cpu=cpu)


def _run(
    command: Sequence[str], folder: Path, *, python: Path | None = None
) -> tuple[float, float, float, list[str]]:
    """Run a script; returns (when it began, seconds to its first line, its CPU seconds, its lines)."""
    env = environment(str(folder), "default allocator", threads=THREADS, ours=python is None)
    before, began, first_line = _cpu_seconds(), time.time(), None
    process = subprocess.Popen(
        [str(python or sys.executable), "-u", *command],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        first_line = first_line or time.time() - began
        lines.append(line)
    if process.wait():
        sys.exit(f"{' '.join(command)} ended with code {process.returncode}:\n{''.join(lines)}")
    return began, first_line or time.time() - began, _cpu_seconds() - before, lines


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _write_rows(path: Path) -> None:
    """In our keys, and beside them in TRL's."""
    pairs = [(f"thing {i}:", ("red", "green", "blue", "white")[i % 4]) for i in range(ROWS)]
    for target, names in (
        (path, ("input", "output")),
        (path.with_name(f"trl_{path.name}"), ("prompt", "completion")),
    ):
        target.write_text("".join(json.dumps(dict(zip(names, pair, strict=True))) + "\n" for pair in pairs))


def _write_model(folder: Path) -> None:
    """A Llama with random weights and a tokenizer of bytes, as transformers writes them."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        [],
        trainers.BpeTrainer(
            vocab_size=259, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=259,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).save_pretrained(folder)
