# SPDX-License-Identifier: Apache-2.0
"""The command lines of NeMo-Aligner's SFT tutorial, every key as printed, at toy size.

Changed are paths, ``trainer.devices``, ``trainer.precision`` and ``exp_manager.create_wandb_logger``.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
import yaml

ROOT = Path(__file__).parents[2]
GPT = ROOT / "examples/nlp/gpt"

TERMINAL = """
    trainer.precision=32
    trainer.num_nodes=1
    trainer.devices=2
    trainer.sft.max_steps=-1
    trainer.sft.limit_val_batches=40
    trainer.sft.val_check_interval=1000
    model.megatron_amp_O2=True
    model.restore_from_path={model}
    model.optim.lr=5e-6
    model.answer_only_loss=True
    model.data.num_workers=0
    model.data.train_ds.micro_batch_size=1
    model.data.train_ds.global_batch_size=128
    model.data.train_ds.file_path={data}
    model.data.validation_ds.micro_batch_size=1
    model.data.validation_ds.global_batch_size=128
    model.data.validation_ds.file_path={data}
    exp_manager.create_wandb_logger=False
    exp_manager.explicit_log_dir={results}
    exp_manager.wandb_logger_kwargs.project=sft_run
    exp_manager.wandb_logger_kwargs.name=dolly_sft_run
    exp_manager.checkpoint_callback_params.save_nemo_on_train_end=True
    exp_manager.resume_if_exists=True
    exp_manager.resume_ignore_no_checkpoint=True
    exp_manager.create_checkpoint_callback=True
    exp_manager.checkpoint_callback_params.monitor=validation_loss
"""
SLURM = """
    trainer.precision=32
    trainer.num_nodes=1
    trainer.devices=2
    trainer.sft.max_steps=-1
    trainer.sft.limit_val_batches=40
    trainer.sft.val_check_interval=1000
    trainer.sft.save_interval=50
    model.megatron_amp_O2=True
    model.restore_from_path={model}
    model.optim.lr=5e-6
    model.answer_only_loss=True
    model.data.num_workers=0
    model.data.train_ds.micro_batch_size=1
    model.data.train_ds.global_batch_size=128
    model.data.train_ds.file_path={data}
    model.data.validation_ds.micro_batch_size=1
    model.data.validation_ds.global_batch_size=128
    model.data.validation_ds.file_path={data}
    exp_manager.create_wandb_logger=False
    exp_manager.explicit_log_dir={results}
    exp_manager.wandb_logger_kwargs.project=WANDB_PROJECT
    exp_manager.wandb_logger_kwargs.name=dolly_sft_run
    exp_manager.resume_if_exists=True
    exp_manager.resume_ignore_no_checkpoint=True
    exp_manager.create_checkpoint_callback=True
    exp_manager.checkpoint_callback_params.save_nemo_on_train_end=True
    exp_manager.checkpoint_callback_params.monitor=validation_loss
"""
OLD_CONFIG = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "encoder_seq_length": 256,
    "normalization": "layernorm1p",
    "activation": "fast-swiglu",
    "bias": False,
    "position_embedding_type": "rope",
    "rotary_percentage": 0.5,
    "share_embeddings_and_output_weights": False,
    "precision": "${trainer.precision}",
    "tokenizer": {"library": "sentencepiece", "type": None, "model": "nemo:2b_tokenizer.model"},
}


@pytest.fixture
def dolly(tmp_path: Path) -> Path:
    """Raw rows, as databricks-dolly-15k.jsonl has them; the last is longer than the toy models take."""
    path = tmp_path / "databricks-dolly-15k.jsonl"
    rows = [
        {
            "instruction": f"When did line {i} start?",
            "context": f"Line {i} opened in {1900 + i}." if i % 3 else "",
            "response": f"In {1900 + i}.",
            "category": "closed_qa",
        }
        for i in range(12)
    ]
    rows[-1]["context"] *= 40
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def old_checkpoint(tmp_path: Path) -> Path:
    """A folder like the extracted GPT-2B-001_bf16_tp1.nemo: NeMo's old names, a SentencePiece tokenizer."""
    folder = tmp_path / "model_checkpoint"
    folder.mkdir()
    text = tmp_path / "text"
    text.write_text("the lamp is lit\nwhen did line one start\nit opened in nineteen hundred\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "2b_tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "2b_tokenizer.vocab").unlink()
    hidden, ffn, rows = 64, 96, 384
    torch.manual_seed(1)
    root = "model.language_model"
    weights = {
        f"{root}.embedding.word_embeddings.weight": torch.randn(rows, hidden),
        f"{root}.encoder.final_layernorm.weight": torch.zeros(hidden),
        f"{root}.encoder.final_layernorm.bias": torch.zeros(hidden),
        f"{root}.output_layer.weight": torch.randn(rows, hidden) / 8,
    }
    for i in range(2):
        layer = f"{root}.encoder.layers.{i}"
        weights |= {
            f"{layer}.input_layernorm.weight": torch.zeros(hidden),
            f"{layer}.input_layernorm.bias": torch.zeros(hidden),
            f"{layer}.self_attention.query_key_value.weight": torch.randn(3 * hidden, hidden) / 8,
            f"{layer}.self_attention.dense.weight": torch.randn(hidden, hidden) / 8,
            f"{layer}.post_attention_layernorm.weight": torch.zeros(hidden),
            f"{layer}.post_attention_layernorm.bias": torch.zeros(hidden),
            f"{layer}.mlp.dense_h_to_4h.weight": torch.randn(2 * ffn, hidden) / 8,
            f"{layer}.mlp.dense_4h_to_h.weight": torch.randn(hidden, ffn) / 10,
        }
    torch.save({name: tensor.bfloat16() for name, tensor in weights.items()}, folder / "model_weights.ckpt")
    (folder / "model_config.yaml").write_text(yaml.safe_dump(OLD_CONFIG))
    return folder


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_2b_path_from_the_old_checkpoint_to_the_terminal_command(
    run: Callable, old_checkpoint: Path, dolly: Path, tmp_path: Path
):
    converted = run(
        ["--in-folder", f"./{old_checkpoint.name}", "--out-file", "./mcore_gpt.nemo"],
        command=[GPT / "convert_nemo_gpt_to_mcore.py"],
    )
    assert converted.wait() == 0, converted.err
    words = TERMINAL.format(
        model=tmp_path / "mcore_gpt.nemo", data=dolly, results=tmp_path / "results"
    ).split()
    job = run(words)
    assert job.wait() == 0, job.err
    assert "2 rank(s) started by local" in job.err
    assert "Dolly" in job.err
    assert "not yet in effect" not in job.err
    assert "create_wandb_logger=False has" not in job.err
    (checkpoint,) = (
        path.parent for path in (tmp_path / "results/checkpoints").glob("meg*/trainer_state.json")
    )
    assert re.fullmatch(
        r"megatron_gpt_sft--validation_loss=\d+\.\d{3}-step=1-consumed_samples=12-epoch=0", checkpoint.name
    )
    train, validation = lines(tmp_path / "results/metrics.jsonl")
    assert train["train/consumed_samples"] == 12
    assert validation["validation/loss"] > 0
    # Summed over both ranks, of which one alone has the long row.
    assert "1 of 12 training samples were too long" in job.err
    assert (tmp_path / "results/checkpoints/megatron_gpt_sft.nemo").is_file()
    assert job.temporary_files == []


def test_the_llama_path_from_hugging_face_to_the_slurm_command(
    start: Callable, run: Callable, hf_folder: Path, dolly: Path, tmp_path: Path
):
    model, results = tmp_path / "mcore_gpt.nemo", tmp_path / "results"
    converted = run(
        ["--in-file", hf_folder, "--out-file", model], command=[GPT / "convert_hf_llama_to_nemo.py"]
    )
    assert converted.wait() == 0, converted.err
    words = SLURM.format(model=model, data=dolly, results=results).split()
    # What srun gives each of two tasks.
    step = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_STEP_NUM_TASKS": "2",
    }
    tasks = [start(words, env=step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}) for i in range(2)]
    assert [task.wait() for task in tasks] == [0, 0], tasks[0].err + tasks[1].err
    assert "2 rank(s) started by srun" in tasks[0].err
    assert "not yet in effect" not in tasks[0].err
    assert len(list((results / "checkpoints").glob("meg*/trainer_state.json"))) == 1
    assert "validation/loss" in lines(results / "metrics.jsonl")[-1]
    assert (results / "checkpoints/megatron_gpt_sft.nemo").is_file()


def test_the_one_task_of_each_node_starts_its_ranks(
    start: Callable, run: Callable, settings: dict[str, object], tmp_path: Path
):
    """As srun --ntasks-per-node=1 of seed 001; two nodes are one here."""
    settings = settings | {
        "model.data.train_ds.micro_batch_size": 2,
        "model.data.validation_ds.micro_batch_size": 1,
    }
    asked = settings | {"trainer.num_nodes": 2, "trainer.devices": 2}
    step = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "1",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_LOCALID": "0",
    }
    tasks = [start(asked, env=step | {"SLURM_PROCID": str(i)}) for i in range(2)]
    assert [task.wait() for task in tasks] == [0, 0], tasks[0].err + tasks[1].err
    assert "4 rank(s)" in tasks[0].err
    assert "step 1/3" not in tasks[1].err, "one rank speaks"
    alone = run(settings | {"trainer.devices": 4, "exp_manager.explicit_log_dir": tmp_path / "alone"})
    assert alone.wait() == 0, alone.err
    folders = tmp_path / "run", tmp_path / "alone"
    losses = [
        [line["train/loss"] for line in lines(folder / "metrics.jsonl") if "train/loss" in line]
        for folder in folders
    ]
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]


def test_ranks_that_torchrun_made_are_joined(run: Callable, settings: dict[str, object], tmp_path: Path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    job = run(settings | {"trainer.devices": 2}, command=[*torchrun, GPT / "train_gpt_sft.py"])
    assert job.wait() == 0, job.err
    assert "2 rank(s) started by torchrun" in job.err
    assert len(lines(tmp_path / "run/metrics.jsonl")) == 3


def test_preprocess_writes_what_the_trainer_reads(run: Callable, dolly: Path, tmp_path: Path):
    job = run(["--input", dolly.name], command=[ROOT / "examples/nlp/data/dolly/preprocess.py"])
    assert job.wait() == 0, job.err
    rows = lines(tmp_path / "databricks-dolly-15k-output.jsonl")
    assert len(rows) == 12
    assert all(row.keys() >= {"input", "output"} for row in rows)
    orders = {row["input"].startswith("When") for row in rows if "\n\n" in str(row["input"])}
    assert orders == {True, False}
