# SPDX-License-Identifier: Apache-2.0
"""The vocabulary-parallel head against the plain float64 form, on every rank of TP 1, 2 and 4."""

from pathlib import Path

import fork
import pytest
import torch
import vocab_worker
from torch import Tensor
from vocab_worker import CASES, VOCAB, Case, K, N, factors

RANKS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What 4 ranks make of every case."""
    out = tmp_path_factory.mktemp("vocab")
    fork.run_script(vocab_worker.__file__, out, ranks=RANKS)
    return out


def plain(*, one_pass: bool) -> dict[str, Tensor]:
    """The same by torch alone, on one rank, with all logits at once."""
    hidden, weight, targets = vocab_worker.inputs()
    hidden.requires_grad_(), weight.requires_grad_()
    logp = (hidden @ weight[:VOCAB].t()).log_softmax(-1)
    out = {"logprobs": logp.gather(1, targets[:, None])[:, 0]}
    loss = (out["logprobs"] * factors(N)).sum()
    if not one_pass:
        out["topk_logprobs"], out["topk_ids"] = logp.topk(K, dim=-1)
        out["entropy"] = -(logp.exp() * logp).sum(-1)
        loss = loss + (out["entropy"] * factors(N).exp()).sum() + (out["topk_logprobs"] * factors(N, K)).sum()
    out["grad_hidden"], out["grad_weight"] = torch.autograd.grad(loss, (hidden, weight))
    return {name: x.detach() for name, x in out.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_the_plain_ones(folder: Path, case: Case):
    expected = plain(one_pass=case.form == "one-pass")
    for rank in range(RANKS):
        found = torch.load(folder / f"{case}-rank{rank}.pt")
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, rtol=1e-11, atol=1e-11)
        assert int(found.get("topk_ids", torch.zeros(1)).max()) < VOCAB
        assert not found["grad_weight"][VOCAB:].any()
