# SPDX-License-Identifier: Apache-2.0
"""Responses of 4 ranks at every layout: ``python writing_worker.py OUT_FOLDER 4``."""

import gc
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import worker
from echo import Echo
from fork import fork_ranks

from nemo_aligner.checkpoint.sharded import load_model
from nemo_aligner.models.gpt.model import build_gpt
from nemo_aligner.models.gpt.policy import GPTPolicy
from nemo_aligner.models.sampling_config import SamplingConfig
from nemo_aligner.parallel import world
from nemo_aligner.parallel.ranks import Layout, Ranks
from nemo_aligner.rollout_batch import Prompt, Rollout

EOS = {True: 38, False: 32}  # by whether the head is tied: tokens that the models like
SAMPLINGS = {
    "greedy": SamplingConfig(use_greedy=True, max_length=14),
    "plain": SamplingConfig(max_length=14),
    "all": SamplingConfig(
        max_length=14, temperature=0.9, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.2, min_length=4
    ),
}


NAMES = (*SAMPLINGS, "turns")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout of 4 ranks; what is left over is data parallel."""

    tp: int = 1
    pp: int = 1
    vp: int = 1
    sp: bool = False
    tied: bool = True

    @property
    def layout(self) -> Layout:
        return Layout(tensor=self.tp, pipeline=self.pp, virtual_pipeline=self.vp, sequence_parallel=self.sp)

    def __str__(self) -> str:
        return f"tp{self.tp}-pp{self.pp}-vp{self.vp}-sp{self.sp:d}-tied{self.tied:d}"


CASES = (
    Case(),
    Case(tp=2),
    Case(tp=4, sp=True, tied=False),
    Case(pp=2),
    Case(pp=4, tied=False),
    Case(pp=2, vp=2),
    Case(tp=2, pp=2, sp=True),
    Case(tp=2, pp=2, tied=False),
)


def prompts() -> list[Prompt]:
    draw = torch.Generator().manual_seed(6)
    lengths = [1 + 7 * i % 11 for i in range(12)]
    return [
        Prompt(tokens=torch.randint(0, worker.VOCAB, (n,), generator=draw).tolist(), number=i, sample=i % 2)
        for i, n in enumerate(lengths)
    ]


def policy(case: Case, weights: Path) -> GPTPolicy:
    model = build_gpt(worker.config(tied=case.tied), case.layout, torch.float32)
    load_model(model, weights / f"weights-tied-{case.tied}")
    return GPTPolicy(model, end_ids=(EOS[case.tied],))


def written(policy: GPTPolicy, mine: list[Prompt], *, slots: int) -> dict[str, tuple[Rollout, torch.Tensor]]:
    """By sampling: the rollout, and the trainer's log-probs of it where the last stage is."""
    found = {}
    for name in NAMES:
        sampling = SAMPLINGS["all" if name == "turns" else name]
        turns = Echo(turns=2, seed=slots) if name == "turns" else None
        rollout = policy.generate(mine, sampling, slots=slots, turns=turns)
        # Stages exchange slices of the sequence under sequence parallelism.
        padded = _padded(rollout, -rollout.seq_length % world.tp_size())
        found[name] = rollout, policy.logprobs(padded, sampling)[:, : rollout.seq_length]
    return found


def _padded(rollout: Rollout, columns: int) -> Rollout:
    names = ("tokens", "loss_mask", "sampler_logprobs")
    pad = {name: torch.nn.functional.pad(getattr(rollout, name), (0, columns)) for name in names}
    return replace(rollout, **pad)


def ends_early(out: Path) -> None:
    """Data parallel ranks with short and with long responses: when each was done."""
    model = policy(Case(), out)
    config = SamplingConfig(max_length=2 if world.dp_rank() == 0 else 50, min_length=0)
    model.generate(prompts()[:2], config)
    world.barrier()
    began = time.monotonic()
    model.generate(prompts()[:2], config)
    took = time.monotonic() - began
    world.barrier()
    torch.save({"generate": took, "all": time.monotonic() - began}, out / f"time-{world.dp_rank()}.pt")


def run_rank(rank: int, size: int, out: Path) -> None:
    torch.set_num_threads(1)
    for number, layout in enumerate(dict.fromkeys(case.layout for case in CASES)):
        meeting = f"file://{out}/ranks-{number}"
        ranks = Ranks(rank=rank, world_size=size, local_rank=rank, init_method=meeting, starter="local")
        world.start(ranks, layout=layout, timeout=timedelta(seconds=60))
        for case in CASES:
            if case.layout == layout:
                mine = prompts()[world.dp_rank() :: world.dp_size()]
                torch.save(
                    {"last": world.is_last_stage(), "dp": (world.dp_rank(), world.dp_size())}
                    | written(policy(case, out), mine, slots=3),
                    out / f"{case}-rank{rank}.pt",
                )
        if layout == Layout():
            ends_early(out)
        world.barrier()
        world.stop()
        gc.collect()


if __name__ == "__main__":
    fork_ranks(run_rank)
