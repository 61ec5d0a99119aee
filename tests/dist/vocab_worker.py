# SPDX-License-Identifier: Apache-2.0
"""The head of 4 ranks at TP 1, 2 and 4: ``python vocab_worker.py OUT_FOLDER 4``."""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from fork import fork_ranks
from torch import Tensor

from nemo_aligner.parallel import world
from nemo_aligner.parallel.collectives import gather_over_tensor_parallel, sum_over_tensor_parallel
from nemo_aligner.parallel.ranks import Layout, Ranks
from nemo_aligner.parallel.vocab import HeadRequest, head_outputs

# Slices of 8 ids at TP 4: two full ranks, one with 3 ids and 5 of padding, one that is padding alone.
N, HIDDEN, VOCAB, PADDED, K = 40, 6, 19, 32, 5
FORMS = ("kept", "recomputed", "one-pass")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One head at one layout."""

    tp: int
    form: str
    rows: int  # of a chunk, by the padded slice

    def __str__(self) -> str:
        return f"tp{self.tp}-{self.form}-rows{self.rows}"


CASES = tuple(Case(tp=tp, form=form, rows=rows) for tp in (1, 2, 4) for form in FORMS for rows in (16, 1000))


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, H], the whole weight [PADDED, H] whose padding would win were it seen, targets [N]."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, HIDDEN, generator=draw, dtype=torch.float64)
    weight = torch.randn(PADDED, HIDDEN, generator=draw, dtype=torch.float64)
    weight[VOCAB:] = 1e4
    return hidden, weight, torch.randint(0, VOCAB, (N,), generator=draw)


def factors(*shape: int) -> Tensor:
    """What each output counts in the loss."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def measure(case: Case) -> dict[str, Tensor]:
    """Outputs, and gradients put together from all tensor parallel ranks."""
    hidden, weight, targets = inputs()
    hidden.requires_grad_()
    mine = weight.chunk(case.tp)[world.tp_rank()].clone().requires_grad_()
    one_pass = case.form == "one-pass"
    request = HeadRequest(
        vocab_size=VOCAB,
        entropy=not one_pass,
        top_k=0 if one_pass else K,
        kept_logits_bytes=1 << 30 if case.form == "kept" else 0,
        chunk_bytes=case.rows * mine.shape[0] * 8,
    )
    weights = factors(N) if one_pass else None
    out = head_outputs(hidden, mine, targets, request=request, logprob_grad=weights)
    found = {"logprobs": out.logprobs}
    loss = (out.logprobs * factors(N)).sum()
    if not one_pass:
        found |= {"entropy": out.entropy, "topk_logprobs": out.topk_logprobs, "topk_ids": out.topk_ids}
        loss = loss + (out.entropy * factors(N).exp()).sum() + (out.topk_logprobs * factors(N, K)).sum()
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, mine))
    found["grad_hidden"] = sum_over_tensor_parallel(grad_hidden)
    found["grad_weight"] = gather_over_tensor_parallel(grad_weight.t()).t()
    return {name: x.detach() for name, x in found.items()}


def run_rank(rank: int, size: int, out: Path) -> None:
    torch.set_num_threads(1)
    for tp in (1, 2, 4):
        meeting = f"file://{out}/ranks-{tp}"
        ranks = Ranks(rank=rank, world_size=size, local_rank=rank, init_method=meeting, starter="local")
        world.start(ranks, layout=Layout(tensor=tp), timeout=timedelta(seconds=60))
        for case in CASES:
            if case.tp == tp:
                torch.save(measure(case), out / f"{case}-rank{rank}.pt")
        world.barrier()
        world.stop()


if __name__ == "__main__":
    fork_ranks(run_rank)
