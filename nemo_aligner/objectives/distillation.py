# SPDX-License-Identifier: Apache-2.0
"""Knowledge distillation: a student learns what a teacher holds likely (Hinton 2015, arXiv 1503.02531)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_aligner.batch import TeacherBatch, TokenBatch, Unit
from nemo_aligner.objectives.config import Divergence
from nemo_aligner.objectives.protocol import Metrics, ModelOutput, Wants


def over_candidates(logprobs: Tensor, *, scale: float, tail: bool) -> Tensor:
    """Return the log-probs of a distribution over K tokens, of which the whole vocabulary's [..., K] are given.

    With ``tail`` all other tokens are one more, [..., K + 1], and ``scale`` is 1. Without it the K tokens are all there
    are, ``softmax(scale log p)``: the scale is the reciprocal of a temperature.

    >>> over_candidates(torch.tensor([0.5, 0.25]).log(), scale=1.0, tail=True).exp()
    tensor([0.5000, 0.2500, 0.2500])
    >>> over_candidates(torch.tensor([0.5, 0.25]).log(), scale=1.0, tail=False).exp()
    tensor([0.6667, 0.3333])
    """
    if not tail:
        return F.log_softmax(scale * logprobs, dim=-1)
    rest = 1 - logprobs.exp().sum(-1, keepdim=True)
    return torch.cat((logprobs, rest.clamp(min=torch.finfo(rest.dtype).eps).log()), dim=-1)


def divergence(student: Tensor, teacher: Tensor, kind: Divergence) -> Tensor:
    """Return [...]: how far two distributions, log-probs [..., K], are apart, in nats.

    "fwd_kl" is ``KL(teacher || student)``, "bwd_kl" ``KL(student || teacher)``, and "js" the mean of both to their
    mixture (Agarwal 2023, arXiv 2306.13649, eq. 1 with beta 1/2).

    >>> half, other = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    >>> divergence(other, half, "fwd_kl"), divergence(other, half, "bwd_kl")
    (tensor(0.1438), tensor(0.1308))
    """
    match kind:
        case "fwd_kl":
            return (teacher.exp() * (teacher - student)).sum(-1)
        case "bwd_kl":
            return (student.exp() * (student - teacher)).sum(-1)
        case "js":
            mixture = torch.logaddexp(student, teacher) - torch.log(torch.tensor(2.0, dtype=student.dtype))
            return (divergence(mixture, teacher, "fwd_kl") + divergence(mixture, student, "fwd_kl")) / 2


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The mean over loss tokens of ``kd_weight`` times :func:`divergence` plus ``nll_weight`` times ``-log p(token)``.

    Hinton multiplies the divergence by the temperature's square; here its weight can.
    """

    kind: Divergence = "fwd_kl"
    tail: bool = True  # see over_candidates
    scale: float = 1.0  # of the student's log-probs
    teacher_scale: float = 1.0
    kd_weight: float = 1.0
    nll_weight: float = 0.0

    wants = frozenset({Wants.LOGPROBS, Wants.TOPK})
    unit = Unit.TOKEN
    metrics = ("loss", "kd_loss", "sft_loss", "teacher_coverage")

    def candidates(self, batch: TokenBatch) -> Tensor:
        """See CandidateObjective: the teacher's."""
        assert isinstance(batch, TeacherBatch), type(batch)
        return batch.teacher_ids

    def __call__(self, output: ModelOutput, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """The summed loss; its two parts, and the teacher's probability of all K tokens, per loss token."""
        assert isinstance(batch, TeacherBatch)
        assert output.logprobs is not None and output.topk_logprobs is not None
        mask, count = batch.loss_tokens(), batch.count(self.unit)
        teacher = over_candidates(batch.teacher_logprobs, scale=self.teacher_scale, tail=self.tail)
        student = over_candidates(output.topk_logprobs, scale=self.scale, tail=self.tail)
        kd_loss = divergence(student, teacher, self.kind).where(mask, 0).sum()
        sft_loss = -output.logprobs.where(mask, 0).sum()
        loss = self.kd_weight * kd_loss + self.nll_weight * sft_loss
        coverage = batch.teacher_logprobs.exp().sum(-1).where(mask, 0).sum()
        parts = {"loss": loss, "kd_loss": kd_loss, "sft_loss": sft_loss, "teacher_coverage": coverage}
        return loss, {name: (x.detach(), count) for name, x in parts.items()}
