# SPDX-License-Identifier: Apache-2.0
"""Knowledge distillation: values by numpy and TRL, the exact divergence of a whole vocabulary, gradients, padding."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_aligner.batch import TeacherBatch, TokenBatch
from nemo_aligner.objectives.distillation import Distillation, divergence, over_candidates
from nemo_aligner.objectives.protocol import ModelOutput

KINDS = ("fwd_kl", "bwd_kl", "js")
VOCAB = 7
TRL = json.loads((Path(__file__).parents[2] / "fixtures/trl_distillation.json").read_text())


def drawn(seed: int, *shape: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, VOCAB, generator=draw, dtype=torch.float64).log_softmax(-1)


def by_numpy(student: torch.Tensor, teacher: torch.Tensor, kind: str) -> np.ndarray:
    q, p = np.exp(student.numpy()), np.exp(teacher.numpy())

    def kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a * np.log(a / b)).sum(-1)

    middle = (p + q) / 2
    return {"fwd_kl": kl(p, q), "bwd_kl": kl(q, p), "js": (kl(p, middle) + kl(q, middle)) / 2}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_divergences_are_numpys(kind):
    student, teacher = drawn(1, 5), drawn(2, 5)
    np.testing.assert_allclose(
        divergence(student, teacher, kind), by_numpy(student, teacher, kind), atol=1e-12
    )
    np.testing.assert_allclose(divergence(teacher, teacher, kind), 0, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_divergences_of_whole_vocabularies_are_trls(kind, temperature):
    student, teacher = (
        over_candidates(
            torch.tensor(TRL[side], dtype=torch.float64).log_softmax(-1), scale=1 / temperature, tail=False
        )
        for side in ("student", "teacher")
    )
    theirs = TRL["by_temperature"][str(temperature)][kind]
    np.testing.assert_allclose(divergence(student, teacher, kind), theirs, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_but_one_and_a_tail_are_the_whole_vocabulary(kind):
    """The tail of one token is that token."""
    student, teacher = (over_candidates(drawn(seed, 5)[:, :-1], scale=1.0, tail=True) for seed in (1, 2))
    np.testing.assert_allclose(
        divergence(student, teacher, kind), by_numpy(drawn(1, 5), drawn(2, 5), kind), atol=1e-9
    )


def test_without_a_tail_a_scale_is_the_reciprocal_of_a_temperature():
    logprobs = drawn(1, 5)
    found = over_candidates(logprobs[:, :3] + 4.2, scale=0.5, tail=False)
    torch.testing.assert_close(found, (logprobs[:, :3] / 2).log_softmax(-1))


def test_a_sure_teacher_has_a_finite_tail():
    sure = torch.tensor([[0.0, -40.0]])
    found = over_candidates(sure, scale=1.0, tail=True)
    assert found.isfinite().all()
    assert (
        divergence(over_candidates(torch.tensor([[-1.0, -2.0]]), scale=1.0, tail=True), found, "fwd_kl")
        .isfinite()
        .all()
    )


def batch(*, padding_rows: int = 0) -> TeacherBatch:
    """A prompt of 2 tokens and a response of 2, for which the teacher's two most likely tokens are known."""
    rows = [([1, 2, 3, 4], [False, False, True, True])] + [([0], [False])] * padding_rows
    tokens = TokenBatch.from_rows(rows, pad_id=0, seq_length=5)
    teacher = torch.zeros(len(rows), 5, 2)
    teacher[0, 2:4] = torch.tensor([[0.6, 0.3], [0.5, 0.25]]).log()
    return tokens.extended(
        TeacherBatch, teacher_logprobs=teacher, teacher_ids=torch.zeros(teacher.shape).long()
    )


def output(rows: TeacherBatch) -> ModelOutput:
    student = torch.zeros(rows.teacher_logprobs.shape)
    student[0, 2:4] = torch.tensor([[0.5, 0.25], [0.5, 0.25]]).log()
    logprobs = torch.zeros(rows.tokens.shape)
    logprobs[0, 2:4] = torch.tensor([-1.0, -3.0])
    return ModelOutput(logprobs=logprobs, topk_logprobs=student, topk_ids=rows.teacher_ids)


def objective(*, tail: bool = True) -> Distillation:
    return Distillation(tail=tail, kd_weight=2.0, nll_weight=0.5)


def test_values_worked_by_hand():
    # The second token costs nothing: there both say the same.
    wanted = 0.6 * np.log(0.6 / 0.5) + 0.3 * np.log(0.3 / 0.25) + 0.1 * np.log(0.1 / 0.25)
    rows = batch()
    loss, metrics = objective()(output(rows), rows)
    assert loss.item() == pytest.approx(2 * wanted + 0.5 * 4, abs=1e-6)
    found = {name: (float(total), int(count)) for name, (total, count) in metrics.items()}
    assert found["kd_loss"] == (pytest.approx(wanted, abs=1e-6), 2)
    assert found["sft_loss"] == (4.0, 2)
    assert found["teacher_coverage"] == (pytest.approx(0.9 + 0.75), 2)
    assert set(metrics) == set(objective().metrics)


@pytest.mark.parametrize("tail", [True, False])
def test_padding_changes_nothing(tail):
    found = [objective(tail=tail)(output(rows), rows) for rows in (batch(), batch(padding_rows=2))]
    torch.testing.assert_close(found[0][0], found[1][0])
    for name, (total, count) in found[0][1].items():
        assert (float(total), int(count)) == tuple(map(float, found[1][1][name])), name


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, tail):
    teacher = over_candidates(drawn(2, 4)[:, :3], scale=1.0, tail=tail)
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def loss(z: torch.Tensor) -> torch.Tensor:
        student = over_candidates(z.log_softmax(-1)[:, :3], scale=1.0, tail=tail)
        return divergence(student, teacher, kind)

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())
