# SPDX-License-Identifier: Apache-2.0
"""A toy model and toy data, and the scripts run in processes of their own as a person runs them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from nemo_aligner.checkpoint.convert import import_from_huggingface
from tests.functional.zygote import Copied, Zygote

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/nlp/gpt/train_gpt_sft.py"
COLOURS = ("red", "green", "blue", "white")
# Settings of other layouts than one rank, by what a test calls them.
LAYOUTS = {
    "TP2": {"trainer.devices": 2, "model.tensor_model_parallel_size": 2, "model.sequence_parallel": True},
    "PP2 x DP2": {"trainer.devices": 4, "model.pipeline_model_parallel_size": 2, "model.micro_batch_size": 2},
}
# For scripts whose objective tests/dist has at every layout: one that cuts data, layers and batches.
MIXED = "PP2 x DP2"


def toy_config(**changed: object) -> LlamaConfig:
    return LlamaConfig(
        **{
            "vocab_size": 259,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        | changed
    )


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with a byte-level tokenizer, as transformers writes it."""
    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    LlamaForCausalLM(toy_config()).save_pretrained(folder)
    write_toy_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def reward_nemo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of the toy's size, made of transformers' sequence classification."""
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(1)
    LlamaForSequenceClassification(
        toy_config(num_labels=1, pad_token_id=0, initializer_range=0.1)
    ).save_pretrained(folder / "hf")
    write_toy_tokenizer(folder / "hf")
    import_from_huggingface(folder / "hf", str(folder / "reward.nemo"))
    return folder / "reward.nemo"


def write_toy_tokenizer(folder: Path) -> None:
    """Bytes, and three tokens before them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=259,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def nemo(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model as a .nemo."""
    path = tmp_path_factory.mktemp("nemo") / "toy.nemo"
    import_from_huggingface(hf_folder, str(path))
    return path


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """512 prompts as the tutorial writes them."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"text": f"User: thing {i}?\n\nAssistant:"} for i in range(512)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A folder for temporary files whose path is short enough for Triton's sockets."""
    with tempfile.TemporaryDirectory(prefix="na_") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 prompts with one of four responses each."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"input": f"thing {i}:", "output": COLOURS[i % 4]} for i in range(32)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def settings(nemo: Path, data: Path, tmp_path: Path) -> dict[str, object]:
    """Settings of a toy run that ends well; tests change some."""
    return {
        "model.restore_from_path": nemo,
        "model.data.train_ds.file_path": data,
        "model.data.train_ds.micro_batch_size": 4,
        "model.data.train_ds.global_batch_size": 8,
        "model.data.validation_ds.file_path": data,
        "model.optim.sched.constant_steps": 0,
        "trainer.precision": 32,
        "trainer.sft.max_steps": 2,
        "exp_manager.explicit_log_dir": tmp_path / "run",
        "exp_manager.create_tensorboard_logger": False,
    }


@dataclass(kw_only=True)
class Job:
    """A running script, its output in files, its temporary files in a folder of its own."""

    process: subprocess.Popen[str] | Copied
    folder: Path
    started: float
    ranks: list[psutil.Process]

    @property
    def err(self) -> str:
        return (self.folder / "stderr").read_text()

    @property
    def out(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def temporary_files(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "tmp").glob("nemo_aligner_*"))

    def wait(self, *, timeout: float = 120) -> int:
        """The exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.err[-4000:]}") from None

    def wait_for(self, text: str, *, timeout: float = 90) -> None:
        """Until ``text`` stands in stderr; then ``ranks`` are the processes of the ranks."""
        deadline = time.monotonic() + timeout
        while text not in self.err:
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.err[-4000:]}"
            assert time.monotonic() < deadline, f"no {text!r} in {timeout} s:\n{self.err[-4000:]}"
            time.sleep(0.05)
        self.ranks = psutil.Process(self.process.pid).children()

    def kill(self) -> None:
        """SIGKILL the job's own processes, not Triton's, which have to see to themselves."""
        process = psutil.Process(self.process.pid)
        own = [process, *(child for child in process.children() if "python" in child.name())]
        for one in own:
            one.send_signal(signal.SIGKILL)
        psutil.wait_procs(own, timeout=10)
        self.process.wait()

    def alive(self) -> list[psutil.Process]:
        """Ranks that have not ended."""
        dead = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        found = []
        for rank in self.ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                if rank.status() not in dead:
                    found.append(rank)
        return found


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Starts scripts without the time of their imports."""
    with contextlib.closing(Zygote()) as process:
        yield process


@pytest.fixture
def start(tmp_path: Path, zygote: Zygote) -> Iterator[Callable[..., Job]]:
    """Starts the SFT script with settings, or any command; whatever is left at the end of the test is killed.

    With variables that libraries read when they are imported, it is a fresh interpreter.
    """
    jobs: list[Job] = []

    def begin(
        settings: dict[str, object] | Sequence[object],
        *,
        command: Sequence[object] = (SCRIPT,),
        env: dict[str, str] | None = None,
    ) -> Job:
        words = (
            [f"{key}={value}" for key, value in settings.items()] if isinstance(settings, dict) else settings
        )
        folder = tmp_path / f"job{len(jobs)}"
        (folder / "tmp").mkdir(parents=True)
        toy = {
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(folder / "tmp"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        place = {"cwd": tmp_path, "env": os.environ | toy | (env or {})}
        words = [*map(str, command), *map(str, words)]
        if any(value and name != "TMPDIR" for name, value in (env or {}).items()):
            with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
                process = subprocess.Popen(
                    [sys.executable, *words],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    text=True,
                    start_new_session=True,
                    **place,
                )
        else:
            process = zygote.start(words, stdout=folder / "stdout", stderr=folder / "stderr", **place)
        jobs.append(Job(process=process, folder=folder, started=time.monotonic(), ranks=[]))
        return jobs[-1]

    yield begin
    for job in jobs:
        for process in (*job.alive(), job.process):
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.send_signal(signal.SIGKILL)
        job.process.wait()


@pytest.fixture
def run(start: Callable[..., Job]) -> Callable[..., Job]:
    """As ``start``, but waits for the end."""

    def complete(
        settings: dict[str, object] | Sequence[object], *, command: Sequence[object] = (SCRIPT,)
    ) -> Job:
        job = start(settings, command=command)
        job.wait()
        return job

    return complete


@pytest.fixture
def kill_and_resume(start: Callable[..., Job], run: Callable[..., Job]) -> Callable[..., None]:
    """Runs a script in the folder "whole"; and in "killed", killed once a step is saved, and again to its end."""

    def twice(settings: Callable[[str], dict[str, object]], *, command: Sequence[object], step: int) -> None:
        whole = run(settings("whole"), command=command)
        assert whole.process.returncode == 0, whole.err[-3000:]
        job = start(settings("killed"), command=command)
        job.wait_for(f"-step={step}-consumed_samples", timeout=120)
        job.kill()
        again = run(settings("killed"), command=command)
        assert again.process.returncode == 0, again.err[-3000:]
        assert "resumed after step" in again.err

    return twice
