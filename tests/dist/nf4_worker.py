# SPDX-License-Identifier: Apache-2.0
"""A base in four bits, tensor parallel: ``python nf4_worker.py OUT_FOLDER 2``."""

from datetime import timedelta
from pathlib import Path

import torch
from fork import fork_ranks
from objective_cases import OBJECTIVES, VOCAB

from nemo_aligner.checkpoint.sharded import load_model, save_model
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.learning_rate import OptimConfig, SchedConfig
from nemo_aligner.models.gpt.lora import add_adapters
from nemo_aligner.models.gpt.model import build_gpt
from nemo_aligner.models.gpt.nf4 import quantize
from nemo_aligner.models.gpt.peft_config import LoRAConfig
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.objectives.nll import NLL
from nemo_aligner.parallel import world
from nemo_aligner.parallel.ranks import Layout, Ranks
from nemo_aligner.run.metrics import means

CONFIG = GPTConfig(
    num_layers=2,
    hidden_size=128,
    ffn_hidden_size=256,
    num_attention_heads=8,
    num_query_groups=4,
    vocab_size=VOCAB,
    make_vocab_size_divisible_by=8,
    max_position_embeddings=64,
    normalization="rmsnorm",
    activation="swiglu",
    precision="32",
)


def run(layout: Layout, weights: Path, saved: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of three steps of adapters on the base in ``weights``; the merged model is ``saved``."""
    model = build_gpt(CONFIG, layout, torch.float32)
    load_model(model, weights)
    quantize(model)
    save_model(model, saved.with_name(f"{saved.name}-base"))
    add_adapters(model, LoRAConfig(target_modules=("all",), adapter_dim=4), seed=7)
    policy = GPTPolicy(model)
    optim = OptimConfig(lr=1e-2, sched=SchedConfig(name="constant", warmup_steps=0))
    policy.prepare_training(optim, clip_grad=0.5, max_steps=3)
    curve = []
    for step in range(3):
        subject = OBJECTIVES["nll"]
        batch = subject.batch(subject.rows(step)[:12])
        loss = means(policy.get_loss_and_metrics([batch], NLL(), forward_only=False))["loss"]
        curve.append((loss, policy.optimizer_step()["grad_norm"]))
    save_model(policy.model, saved)
    return curve


def run_rank(rank: int, size: int, out: Path) -> None:
    torch.set_num_threads(1)
    layout, init = Layout(tensor=2, sequence_parallel=True), f"file://{out}/ranks"
    ranks = Ranks(rank=rank, world_size=size, local_rank=rank, init_method=init, starter="local")
    world.start(ranks, layout=layout, timeout=timedelta(seconds=60))
    curve = run(layout, out / "weights", out / "tp2")
    if rank == 0:
        torch.save(curve, out / "curve.pt")
    world.barrier()
    world.stop()


if __name__ == "__main__":
    fork_ranks(run_rank)
