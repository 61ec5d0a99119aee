# SPDX-License-Identifier: Apache-2.0
"""Every objective of the package: settings that use all of its terms, the head that it needs, and batches for it."""

import importlib
import math
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_aligner import objectives
from nemo_aligner.batch import PreferenceBatch, RatedResponses, ReferencedPairs, TeacherBatch, TokenBatch
from nemo_aligner.data.collate import collate
from nemo_aligner.data.row import Row, TokenSequence
from nemo_aligner.models.gpt.heads import HeadConfig
from nemo_aligner.models.sampling_config import SamplingConfig
from nemo_aligner.objectives.config import DPOConfig, PolicyConfig, ValueConfig
from nemo_aligner.objectives.distillation import Distillation
from nemo_aligner.objectives.kto import KTO
from nemo_aligner.objectives.nll import NLL
from nemo_aligner.objectives.policy import PolicyGradient
from nemo_aligner.objectives.preference import DPO
from nemo_aligner.objectives.protocol import Objective
from nemo_aligner.objectives.reward import AttributePairs, BradleyTerry, Regression
from nemo_aligner.objectives.value import ValueLoss
from nemo_aligner.rollout_batch import Experience, ValueBatch

VOCAB = 101  # odd, so that every tensor parallel size pads it
SEQ_LENGTH = 32
_HEAD = HeadConfig(outputs=3)


@dataclass(frozen=True, kw_only=True)
class ObjectiveCase:
    """An objective, and what it is tried with."""

    objective: Objective
    head: HeadConfig | None = None  # None: a language model
    pairs: bool = False  # two sequences a row
    labels: bool = False
    rewards: bool = False  # given for each sequence
    sampling: SamplingConfig | None = None  # log-probs are of the distribution drawn from
    # with the tensors that the objective reads
    extended: Callable[[TokenBatch], TokenBatch] = lambda batch: batch

    def batch(self, rows: Sequence[Row]) -> TokenBatch:
        """A micro-batch of ``rows``; what it says of a token depends on the token and its position alone."""
        return self.extended(collate(rows, pad_id=0, seq_length=SEQ_LENGTH))

    def rows(self, step: int) -> list[Row]:
        """13 rows of uneven length, 10 to 90 % learned, one with nothing learned, some attributes without a label."""
        draw = torch.Generator().manual_seed(100 + step)
        return [self._row(place, draw) for place in range(13)]

    def _row(self, place: int, draw: torch.Generator) -> Row:
        sequences = tuple(_sequence(place, draw) for _ in range(1 + self.pairs))
        if self.rewards:
            return Row(sequences=sequences, rewards=(1.0 + place % 3, 0.5))
        if not self.labels:
            return Row(sequences=sequences)
        labels = torch.randn(3, generator=draw).tolist()
        if not self.pairs and place % 3 == 1:
            labels[place % 2] = math.nan
        return Row(sequences=sequences, labels=(tuple(labels),) * len(sequences))


def _sequence(place: int, draw: torch.Generator) -> TokenSequence:
    length = int(torch.randint(5, 30, (), generator=draw))
    share = 0.1 + 0.8 * place / 12
    mask = (torch.rand(length, generator=draw) < share).tolist() if place != 4 else [False] * length
    tokens = torch.randint(0, VOCAB, (length,), generator=draw).tolist()
    return TokenSequence(tokens=tokens, loss_mask=[False, *mask[1:]])


def _drawn(batch: TokenBatch, *, seed: int, mean: float = 0.0) -> Tensor:
    """[B, S]: numbers about ``mean``, a function of token and position, so that they follow a row to any rank."""
    table = torch.randn(VOCAB, SEQ_LENGTH, generator=torch.Generator().manual_seed(seed))
    return mean + table[batch.tokens, batch.positions()]


_LOGPROB = -math.log(VOCAB)  # about what random weights give


def _experience(batch: TokenBatch) -> Experience:
    seeds = {"advantages": 1, "returns": 2, "values": 3}
    drawn = {name: _drawn(batch, seed=seed) for name, seed in seeds.items()}
    beliefs = {"logprobs": 4, "reference_logprobs": 5}
    drawn |= {name: _drawn(batch, seed=seed, mean=_LOGPROB) for name, seed in beliefs.items()}
    return batch.extended(Experience, **drawn)


def _with_values(batch: TokenBatch) -> ValueBatch:
    return batch.extended(ValueBatch, values=_drawn(batch, seed=3), returns=_drawn(batch, seed=2))


def _with_reference(batch: TokenBatch) -> ReferencedPairs:
    assert isinstance(batch, PreferenceBatch)
    reference = batch.per_sequence(_drawn(batch, seed=5, mean=_LOGPROB))
    return batch.extended(ReferencedPairs, reference_sums=reference)


def _rated(batch: TokenBatch) -> RatedResponses:
    return batch.extended(
        RatedResponses,
        good=batch.tokens[:, 0] % 2 == 0,
        reference_sums=batch.per_sequence(_drawn(batch, seed=5, mean=_LOGPROB)),
        kl_baseline=torch.full((batch.num_rows,), 0.3),
    )


def _taught(batch: TokenBatch) -> TeacherBatch:
    """Five tokens in each place, a function of the token that is there, with 0.9 of the probability."""
    places = torch.arange(5)
    ids = (batch.tokens[..., None] * 7 + places * 13) % VOCAB
    shares = (_drawn(batch, seed=5)[..., None] - places).log_softmax(-1)
    return batch.extended(TeacherBatch, teacher_ids=ids, teacher_logprobs=shares + math.log(0.9))


_DPO = DPOConfig(label_smoothing=0.1, sft_loss_weight=0.3, sft_average_log_probs=True)
_IPO = replace(_DPO, preference_loss="ipo", label_smoothing=0.0, preference_average_log_probs=True)
_PPO = PolicyConfig(ratio_eps=0.2, ratio_eps_high=0.3, dual_clip=3.0, entropy_bonus=0.01)
OBJECTIVES: dict[str, ObjectiveCase] = {
    "nll": ObjectiveCase(objective=NLL()),
    "ppo": ObjectiveCase(objective=PolicyGradient(_PPO), extended=_experience),
    "ppo_sampled": ObjectiveCase(
        objective=PolicyGradient(_PPO), sampling=SamplingConfig(temperature=0.7), extended=_experience
    ),
    "grpo": ObjectiveCase(
        objective=PolicyGradient(PolicyConfig(loss_mean="sequence"), kl_coefficient=0.1), extended=_experience
    ),
    "gspo": ObjectiveCase(
        objective=PolicyGradient(PolicyConfig(policy_loss="gspo", loss_mean="sequence")), extended=_experience
    ),
    "cispo": ObjectiveCase(
        objective=PolicyGradient(PolicyConfig(policy_loss="cispo", loss_mean="constant"), max_length=16),
        extended=_experience,
    ),
    "dpo": ObjectiveCase(objective=DPO(_DPO), pairs=True, extended=_with_reference),
    "ipo": ObjectiveCase(objective=DPO(_IPO), pairs=True, extended=_with_reference),
    "robust": ObjectiveCase(
        objective=DPO(replace(_DPO, preference_loss="robust")), pairs=True, extended=_with_reference
    ),
    "rpo": ObjectiveCase(
        objective=DPO(DPOConfig(preference_loss="rpo_bwd_kl", gt_reward_scale=0.5)),
        pairs=True,
        rewards=True,
        extended=_with_reference,
    ),
    "simpo": ObjectiveCase(objective=DPO(DPOConfig(preference_loss="simpo")), pairs=True),
    "orpo": ObjectiveCase(
        objective=DPO(DPOConfig(preference_loss="orpo", preference_loss_weight=0.1, sft_loss_weight=1.0)),
        pairs=True,
    ),
    "distillation": ObjectiveCase(
        objective=Distillation(kind="js", kd_weight=0.7, nll_weight=0.3), extended=_taught
    ),
    "kto": ObjectiveCase(objective=KTO(bad_weight=0.7), extended=_rated),
    "bradley_terry": ObjectiveCase(objective=BradleyTerry(), head=_HEAD, pairs=True),
    "average_bradley_terry": ObjectiveCase(
        objective=BradleyTerry(), head=replace(_HEAD, average=True), pairs=True
    ),
    "margin_bt": ObjectiveCase(objective=AttributePairs("margin_bt"), head=_HEAD, pairs=True, labels=True),
    "scaled_bt": ObjectiveCase(objective=AttributePairs("scaled_bt"), head=_HEAD, pairs=True, labels=True),
    "regression": ObjectiveCase(objective=Regression(), head=_HEAD, labels=True),
    "value": ObjectiveCase(
        objective=ValueLoss(ValueConfig(loss_clip_val=0.2)), head=HeadConfig(), extended=_with_values
    ),
}


def packed(batches: Sequence[TokenBatch], *, multiple: int) -> list[TokenBatch]:
    """The sequences of each micro-batch end to end, with tails of padding to one length, a multiple of tokens."""
    tokens = max(int(batch.lengths.sum()) for batch in batches) + 1
    return [batch.packed(-(-tokens // multiple) * multiple) for batch in batches]


def found_in_package() -> set[type]:
    """The classes of nemo_aligner/objectives that are objectives."""
    modules = [
        importlib.import_module(f"{objectives.__name__}.{info.name}")
        for info in pkgutil.iter_modules(objectives.__path__)
        if info.name != "protocol"
    ]
    return {
        kind
        for module in modules
        for kind in vars(module).values()
        if isinstance(kind, type) and kind.__module__ == module.__name__ and hasattr(kind, "wants")
    }
