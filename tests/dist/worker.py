# SPDX-License-Identifier: Apache-2.0
"""All cases of tests/dist in one spawn of ranks: ``python worker.py OUT_FOLDER NUM_RANKS``.

Imports once and forks the ranks; each case builds its layout in the same world and writes OUT_FOLDER/<case>.pt.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from fork import fork_ranks

from nemo_aligner.batch import TokenBatch
from nemo_aligner.checkpoint.sharded import load_model, save_model
from nemo_aligner.data.collate import collate, empty_sample
from nemo_aligner.data.sample import Sample
from nemo_aligner.data.sampler import rank_rows
from nemo_aligner.models.gpt import engine
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.model import GPT, build_gpt
from nemo_aligner.models.gpt.learning_rate import OptimConfig, SchedConfig
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.objectives.nll import NLL
from nemo_aligner.parallel import collectives, world
from nemo_aligner.parallel.ranks import Layout, Ranks

VOCAB = 101  # odd, so that every tensor parallel size pads it
TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout of 8 ranks; what is left over from tp x pp is data parallel."""

    tp: int = 1
    pp: int = 1
    sp: bool = False
    mbs: int = 1
    tied: bool = True
    local_count: bool = False  # divide by this rank's own count: what must not be done

    @property
    def layout(self) -> Layout:
        return Layout(tensor=self.tp, pipeline=self.pp, sequence_parallel=self.sp)

    def __str__(self) -> str:
        flags = [word for word in ("sp", "tied", "local_count") if getattr(self, word)]
        return "-".join([f"tp{self.tp}", f"pp{self.pp}", f"mbs{self.mbs}", *flags])


CASES = (
    Case(),
    Case(mbs=3),
    Case(tied=False, mbs=2),
    Case(tp=2),
    Case(tp=2, sp=True, mbs=2),
    Case(tp=4, sp=True, mbs=4, tied=False),
    Case(pp=2, mbs=2),
    Case(pp=4, tied=False),
    Case(tp=2, pp=2, sp=True, mbs=2),
    Case(tp=2, pp=2, mbs=3, tied=False),
    Case(tp=2, pp=4, sp=True, mbs=2),
    Case(tp=4, pp=2, mbs=5),
)
LOCAL_COUNT = Case(mbs=2, local_count=True)
RELOADED = (Case(tp=2, pp=2), Case(tp=2), Case(tp=2, pp=4), Case(), Case(pp=2), Case(tp=2, sp=True))


def config(*, tied: bool) -> GPTConfig:
    """A Llama with biases and a tied head; untied, every other norm, activation and bias that families have."""
    parts = (
        {"normalization": "rmsnorm", "activation": "swiglu", "bias": True}
        if tied
        else {
            "normalization": "layernorm1p",
            "activation": "squared-relu",
            "bias": False,
            "qkv_bias": True,
            "qk_layernorm": True,
            "rotary_percentage": 0.5,
        }
    )
    return GPTConfig(
        **parts,
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=8,
        num_query_groups=4,
        vocab_size=VOCAB,
        make_vocab_size_divisible_by=8,
        position_embedding_type="rope",
        max_position_embeddings=64,
        share_embeddings_and_output_weights=tied,
        precision="32",
    )


def samples(step: int) -> list[Sample]:
    """13 rows of uneven length, 10 to 90 % learned, one with nothing learned."""
    draw = torch.Generator().manual_seed(100 + step)
    rows = []
    for row in range(13):
        length = int(torch.randint(5, 30, (), generator=draw))
        share = 0.1 + 0.8 * row / 12
        mask = (torch.rand(length, generator=draw) < share).tolist() if row != 4 else [False] * length
        tokens = torch.randint(0, VOCAB, (length,), generator=draw).tolist()
        rows.append(Sample(tokens=tokens, mask=[False, *mask[1:]], truncated=False))
    return rows


def micro_batches(step: int, *, dp_rank: int, dp_size: int, mbs: int) -> list[TokenBatch]:
    rows = samples(step)
    mine = rank_rows(range(len(rows)), dp_rank=dp_rank, dp_size=dp_size, micro_batch_size=mbs)
    return [
        collate([*(rows[i] for i in micro), *[empty_sample(0)] * (mbs - len(micro))], pad_id=0, seq_length=32)
        for micro in mine
    ]


def randomize(model: GPT) -> None:
    """Weights not at their initial scale, norms and biases not trivial. One rank only."""
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
        if parameter.ndim == 1:
            parameter.data.add_(0.7)


def train(case: Case, weights: Path) -> dict[str, list[float]]:
    """Losses and grad norms of 4 steps from the weights saved in ``weights``."""
    model = build_gpt(config(tied=case.tied), case.layout, torch.float32)
    load_model(model, weights)
    policy = GPTPolicy(model)
    sched = SchedConfig(name="constant", warmup_steps=0)
    policy.prepare_training(OptimConfig(lr=1e-2, sched=sched), clip_grad=1.0, max_steps=4)
    curve: dict[str, list[float]] = {"loss": [], "grad_norm": []}
    for step in range(4):
        batches = micro_batches(step, dp_rank=world.dp_rank(), dp_size=world.dp_size(), mbs=case.mbs)
        metrics = policy.get_loss_and_metrics(batches, NLL(), forward_only=False) | policy.optimizer_step()
        for name, values in curve.items():
            values.append(metrics[name])
    return curve


def rows_for_logits() -> TokenBatch:
    draw = torch.Generator().manual_seed(9)
    tokens = torch.randint(0, VOCAB, (3, 24), generator=draw)
    return TokenBatch(
        tokens=tokens, mask=torch.ones_like(tokens, dtype=torch.bool), lengths=torch.full((3,), 24)
    )


def logits(case: Case, weights: Path) -> torch.Tensor | None:
    model = build_gpt(config(tied=case.tied), case.layout, torch.float32).eval()
    load_model(model, weights)
    return engine.logits(model, rows_for_logits())


def run_rank(rank: int, size: int, out: Path) -> None:
    torch.set_num_threads(1)

    @contextlib.contextmanager
    def cut(case: Case, name: str) -> Iterator[None]:
        init = f"file://{out}/ranks-{name}"
        ranks = Ranks(rank=rank, world_size=size, local_rank=rank, init_method=init, starter="local")
        world.start(ranks, layout=case.layout, timeout=TIMEOUT)
        yield
        world.barrier()
        world.stop()

    sum_over_ranks = collectives.sum_over_data_parallel
    for case in (*CASES, LOCAL_COUNT):
        with cut(case, str(case)):
            if case.local_count:
                collectives.sum_over_data_parallel = lambda x: x if x.ndim == 0 else sum_over_ranks(x)
            curve = train(case, out / f"weights-tied-{case.tied}")
            if rank == 0:
                torch.save(curve, out / f"{case}.pt")
    collectives.sum_over_data_parallel = sum_over_ranks

    with cut(RELOADED[0], "save"):
        model = build_gpt(config(tied=True), RELOADED[0].layout, torch.float32)
        load_model(model, out / "weights-tied-True")
        save_model(model, out / "saved/model_weights")
    for case in RELOADED:
        with cut(case, f"reload-{case}"):
            found = logits(case, out / "saved/model_weights")
            if found is not None and world.tp_rank() == 0:
                torch.save(found, out / f"logits-{case}-dp{world.dp_rank()}.pt")


if __name__ == "__main__":
    fork_ranks(run_rank)
