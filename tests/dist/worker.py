# SPDX-License-Identifier: Apache-2.0
"""All cases of tests/dist in one spawn of ranks: ``python worker.py OUT_FOLDER NUM_RANKS``.

Imports once and forks the ranks; each case builds its layout in the same world and writes OUT_FOLDER/<case>.pt.
"""

import contextlib
import gc
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from fork import fork_ranks
from known_weights import fill_adapters
from megatron.core import tensor_parallel
from objective_cases import OBJECTIVES, VOCAB, packed
from whole_logits import logits as logits_of

from nemo_aligner.batch import TokenBatch
from nemo_aligner.checkpoint.sharded import load_model, load_state, save_model, save_state
from nemo_aligner.data.sampler import rank_rows
from nemo_aligner.models.gpt.config import GPTConfig
from nemo_aligner.models.gpt.critic import GPTCritic
from nemo_aligner.models.gpt.learner import GPTLearner
from nemo_aligner.models.gpt.learning_rate import OptimConfig, SchedConfig
from nemo_aligner.models.gpt.lora import add_adapters
from nemo_aligner.models.gpt.model import build_gpt
from nemo_aligner.models.gpt.peft_config import LoRAConfig
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.models.gpt.recompute import Recompute
from nemo_aligner.parallel import collectives, world
from nemo_aligner.parallel.ranks import Layout, Ranks
from nemo_aligner.run.metrics import means

TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout of 8 ranks, what is left over from tp x pp being data parallel, and what is trained in it."""

    objective: str = "nll"  # of OBJECTIVES
    tp: int = 1
    pp: int = 1
    vp: int = 1
    sp: bool = False
    mbs: int = 1
    tied: bool = True
    overlap: bool = False
    bucket_cap_mb: float = 0.01  # a few in a chunk
    bf16: bool = False
    recompute: Recompute = field(default_factory=Recompute)
    lora: bool = False  # adapters in the place of all weights
    packed: bool = False  # the sequences of a micro-batch in one row
    local_count: bool = False  # divide by this rank's own count: what must not be done

    @property
    def layout(self) -> Layout:
        return Layout(tensor=self.tp, pipeline=self.pp, virtual_pipeline=self.vp, sequence_parallel=self.sp)

    @property
    def weights(self) -> str:
        """The folder of the weights that it begins with."""
        head = OBJECTIVES[self.objective].head
        kind = "" if head is None else f"-head{head.outputs}"
        return f"weights-tied-{self.tied}{kind}"

    @property
    def oracle(self) -> "Case":
        """What it is compared with: one rank, one micro-batch."""
        return Case(objective=self.objective, tied=self.tied, mbs=13, lora=self.lora)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    def __str__(self) -> str:
        flags = [
            word
            for word in ("sp", "tied", "overlap", "bf16", "lora", "packed", "local_count")
            if getattr(self, word)
        ]
        recompute = [str(x) for x in astuple(self.recompute) if x is not None]
        return "-".join(
            [
                self.objective,
                f"tp{self.tp}",
                f"pp{self.pp}",
                f"vp{self.vp}",
                f"mbs{self.mbs}",
                *flags,
                *recompute,
            ]
        )


SELECTIVE = Recompute(granularity="selective")
UNIFORM = Recompute(granularity="full", method="uniform", num_layers=2)
BLOCK = Recompute(granularity="full", method="block", num_layers=1)
CASES = (
    Case(),
    Case(mbs=3),
    Case(mbs=3, packed=True),
    Case(tied=False, mbs=2),
    Case(mbs=2, overlap=True),
    Case(mbs=1, tied=False, overlap=True, recompute=UNIFORM),
    Case(tp=2),
    Case(tp=2, sp=True, mbs=2),
    Case(tp=2, sp=True, overlap=True, recompute=SELECTIVE),
    Case(tp=4, sp=True, mbs=4, tied=False),
    Case(pp=2, mbs=2),
    Case(pp=2, mbs=1, tied=False, overlap=True, recompute=BLOCK),
    Case(pp=2, mbs=2, packed=True),
    Case(pp=2, vp=2),  # 4 micro-batches
    Case(tp=2, pp=2, vp=2, sp=True, mbs=3, packed=True),
    Case(pp=2, vp=2, mbs=1, tied=False, overlap=True),
    Case(pp=4, tied=False),
    Case(tp=2, pp=2, sp=True, mbs=2),
    Case(tp=2, pp=2, mbs=3, tied=False),
    # 3 micro-batches, levelled to 4
    Case(tp=2, pp=2, vp=2, sp=True, mbs=3, recompute=replace(UNIFORM, num_layers=1)),
    Case(tp=2, pp=4, mbs=2),
    Case(tp=4, pp=2, sp=True, mbs=4),
    Case(mbs=2, overlap=True, lora=True, recompute=UNIFORM),
    Case(tp=2, mbs=2, lora=True),
    Case(tp=2, sp=True, mbs=4, lora=True, recompute=BLOCK),
    Case(pp=2, vp=2, tied=False, lora=True),
)
# Every other objective, cut in every way: data parallel alone, tensor, sequence, pipeline, interleaved; and packed rows
# that train adapters.
OBJECTIVE_CASES = tuple(
    replace(case, objective=name)
    for name in OBJECTIVES
    if name != "nll"
    for case in (
        Case(mbs=2, overlap=True),
        Case(tp=2, sp=True, mbs=2, recompute=SELECTIVE),
        Case(pp=2, vp=2, mbs=1, tied=False, overlap=True),
        Case(tp=4, pp=2, sp=True, mbs=4),
        # Drawn responses are never packed.
        Case(tp=2, sp=True, mbs=4, lora=True, packed=OBJECTIVES[name].sampling is None),
    )
)
BF16 = (
    Case(bf16=True, mbs=2),
    Case(tp=2, sp=True, bf16=True, overlap=True),
    Case(tp=2, pp=2, vp=2, sp=True, mbs=3, bf16=True),
)
LOCAL_COUNT = Case(mbs=2, local_count=True)
RELOADED = (
    Case(tp=2, pp=2),
    Case(tp=2),
    Case(tp=2, pp=4),
    Case(),
    Case(pp=2),
    Case(pp=2, vp=2),
    Case(tp=2, sp=True),
)
# Loaded and saved again as they are; of the untied one TP 4 is more than it has key/value heads.
AGAIN = (
    Case(tp=2, sp=True),
    Case(pp=2),
    Case(tp=4, sp=True, tied=False),
    Case(tp=4, pp=2, sp=True, tied=False),
)
# Saved with the optimizer by 4 ranks; these go on, each with its number of ranks.
# Its buckets are many, most with padding at their end.
SAVED = Case(tp=2, pp=2, mbs=4, tied=False, overlap=True, bucket_cap_mb=0.002)
RESUMED = {
    replace(SAVED, pp=4, overlap=False): 8,
    replace(SAVED, pp=1): 2,
    replace(SAVED, vp=2, overlap=False): 4,
    replace(SAVED, tp=1, pp=1): 4,
    SAVED: 8,
    replace(SAVED, tp=4, pp=2, sp=True, overlap=False): 8,
}


def config(*, tied: bool) -> GPTConfig:
    """A Llama with biases and a tied head; untied, every other norm, activation and bias that families have, and
    fewer key/value heads than some layouts have tensor parallel ranks.
    """
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
        num_query_groups=4 if tied else 1,  # fewer than tensor parallel ranks
        vocab_size=VOCAB,
        make_vocab_size_divisible_by=8,
        position_embedding_type="rope",
        max_position_embeddings=64,
        share_embeddings_and_output_weights=tied,
        precision="32",
    )


def micro_batches(case: Case, step: int, *, dp_rank: int, dp_size: int) -> list[TokenBatch]:
    subject, mbs = OBJECTIVES[case.objective], case.mbs
    rows = subject.rows(step)
    mine = rank_rows(range(len(rows)), dp_rank=dp_rank, dp_size=dp_size, micro_batch_size=mbs)
    batches = [
        subject.batch([*(rows[i] for i in micro), *[rows[0].padding(0)] * (mbs - len(micro))])
        for micro in mine
    ]
    return packed(batches, multiple=case.tp) if case.packed else batches


def loaded(case: Case, weights: Path) -> GPTLearner:
    """A model ready to train from the weights saved in ``weights``."""
    head = OBJECTIVES[case.objective].head
    model = build_gpt(config(tied=case.tied), case.layout, case.dtype, recompute=case.recompute, head=head)
    load_model(model, weights)
    if case.lora:
        add_adapters(model, LoRAConfig(target_modules=("all",), adapter_dim=4, alpha=8), seed=7)
        fill_adapters(model)
    learner = GPTPolicy(model) if head is None else GPTCritic(model, head=head)
    optim = OptimConfig(
        lr=3e-4,
        eps=1e-4,  # at 1e-8 Adam makes whole steps of what a gradient near 0 rounds to
        sched=SchedConfig(name="constant", warmup_steps=0),
        overlap_grad_sync=case.overlap,
        overlap_param_sync=case.overlap,
        bucket_cap_mb=case.bucket_cap_mb,
    )
    learner.prepare_training(optim, clip_grad=0.5, max_steps=5)
    return learner


def train(learner: GPTLearner, case: Case, steps: Iterable[int]) -> dict[str, list[dict[str, float]]]:
    """The metrics of ``steps``; with overlap, those of a validation of what the second step is about to learn."""
    subject = OBJECTIVES[case.objective]
    learn = partial(
        learner.get_loss_and_metrics,
        objective=subject.objective,
        **({"sampling": subject.sampling} if subject.sampling else {}),
    )
    curve: dict[str, list[dict[str, float]]] = {"steps": [], "validation": []}
    for step in steps:
        batches = micro_batches(case, step, dp_rank=world.dp_rank(), dp_size=world.dp_size())
        if step == 1 and case.overlap:
            curve["validation"].append(means(learn(batches, forward_only=True)))
        metrics = means(learn(batches, forward_only=False))
        curve["steps"].append(metrics | {"grad_norm": learner.optimizer_step()["grad_norm"]})
    return curve


def replicas_agree(learner: GPTLearner) -> bool:
    """Whether all data parallel ranks hold the same weights."""
    mine = torch.cat([p.detach().float().flatten() for p in learner.model.parameters()])
    mean = collectives.sum_over_data_parallel(mine.double()) / world.dp_size()
    return torch.equal(mean.float(), mine)


def rows_for_logits() -> TokenBatch:
    draw = torch.Generator().manual_seed(9)
    tokens = torch.randint(0, VOCAB, (3, 24), generator=draw)
    return TokenBatch(
        tokens=tokens, loss_mask=torch.ones_like(tokens, dtype=torch.bool), lengths=torch.full((3,), 24)
    )


def logits(case: Case, weights: Path) -> torch.Tensor | None:
    model = build_gpt(config(tied=case.tied), case.layout, torch.float32).eval()
    load_model(model, weights)
    return logits_of(model, rows_for_logits())


def train_all(layout: Layout, rank: int, out: Path) -> None:
    """CASES and their kin of this layout."""
    sum_over_ranks = collectives.sum_over_data_parallel
    for case in (*CASES, *OBJECTIVE_CASES, *BF16, LOCAL_COUNT):
        if case.layout != layout:
            continue
        if case.local_count:
            collectives.sum_over_data_parallel = lambda x: x if x.ndim == 0 else sum_over_ranks(x)
        learner = loaded(case, out / case.weights)
        curve: dict = train(learner, case, range(3))
        collectives.sum_over_data_parallel = sum_over_ranks
        curve["agree"] = replicas_agree(learner)
        if rank == 0:
            torch.save(curve, out / f"{case}.pt")


def reload_all(layout: Layout, out: Path) -> None:
    """Weights from TP 2 x PP 2 to RELOADED."""
    for case in RELOADED:
        if case.layout == layout:
            found = logits(case, out / "saved/model_weights")
            if found is not None and world.tp_rank() == 0:
                torch.save(found, out / f"logits-{case}-dp{world.dp_rank()}.pt")


def save_again(layout: Layout, out: Path) -> None:
    """AGAIN of this layout."""
    for case in AGAIN:
        if case.layout == layout:
            model = build_gpt(config(tied=case.tied), layout, torch.float32)
            load_model(model, out / f"weights-tied-{case.tied}")
            save_model(model, out / f"again-{case}/model_weights")


def save_all(rank: int, out: Path) -> None:
    """What the others load: weights, and weights and optimizer after 2 steps of 5."""
    model = build_gpt(config(tied=True), SAVED.layout, torch.float32)
    load_model(model, out / "weights-tied-True")
    save_model(model, out / "saved/model_weights")
    policy = loaded(SAVED, out / "weights-tied-False")
    train(policy, SAVED, range(2))
    save_model(policy.model, out / "resume-weights")
    save_state(policy.training_state(), out / "resume-state")
    curve = train(policy, SAVED, range(2, 5))
    if rank == 0:
        torch.save(curve, out / "undisturbed.pt")


def draw_all(rank: int, out: Path) -> None:
    """Random numbers of this rank's place, twice for one step and once for the next."""

    def draw(step: int) -> tuple[float, float]:
        world.seed_step(7, step)
        with tensor_parallel.get_cuda_rng_tracker().fork():
            shared_out = torch.rand(()).item()
        return torch.rand(()).item(), shared_out

    place = (world.tp_rank(), world.dp_rank(), world.is_last_stage())
    torch.save({"place": place, "draws": [draw(3), draw(3), draw(4)]}, out / f"draws-{rank}.pt")


def resume_all(layout: Layout, num_ranks: int, rank: int, out: Path) -> None:
    """Weights and optimizer from SAVED to RESUMED; 3 more steps each."""
    for case, size in RESUMED.items():
        if (case.layout, size) == (layout, num_ranks):
            policy = loaded(case, out / "resume-weights")
            state = load_state(policy.training_state(), out / "resume-state", remedy="")
            policy.load_training_state(state)
            curve = train(policy, case, range(2, 5))
            if rank == 0:
                torch.save(curve, out / f"resumed-{case}.pt")


def run_rank(rank: int, size: int, out: Path) -> None:
    torch.set_num_threads(1)

    @contextlib.contextmanager
    def cut(layout: Layout, num_ranks: int, name: str) -> Iterator[None]:
        init = f"file://{out}/ranks-{name}"
        ranks = Ranks(rank=rank, world_size=num_ranks, local_rank=rank, init_method=init, starter="local")
        world.start(ranks, layout=layout, timeout=TIMEOUT)
        yield
        world.barrier()
        world.stop()
        gc.collect()  # else the world's process groups live on in cycles, and their threads go on polling

    if rank < SAVED.layout.model_size:
        with cut(SAVED.layout, SAVED.layout.model_size, "save"):
            save_all(rank, out)
    worlds = [*((case.layout, size) for case in CASES), *((case.layout, n) for case, n in RESUMED.items())]
    for number, (layout, num_ranks) in enumerate(dict.fromkeys(worlds)):
        if rank < num_ranks:
            with cut(layout, num_ranks, str(number)):
                resume_all(layout, num_ranks, rank, out)
                if num_ranks == size:
                    train_all(layout, rank, out)
                    reload_all(layout, out)
                    save_again(layout, out)
                if (layout, num_ranks) == (SAVED.layout, size):
                    draw_all(rank, out)


if __name__ == "__main__":
    fork_ranks(run_rank)
