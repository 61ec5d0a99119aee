# SPDX-License-Identifier: Apache-2.0
"""The transform against transformers' processors, the draw against the exact distribution, both against the trainer."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.sampling import MASKED_LOGIT, History, choose, random_uniforms, transform
from nemo_aligner.models.sampling_config import SamplingConfig

V, END = 700, 5
PROMPTS = torch.tensor([[3, 4, 7], [1, 1, 9]])


def logits(rows: int = 2, *, columns: int = V, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * scale


def seen(tokens: Tensor) -> Tensor:
    return torch.zeros(tokens.shape[0], V, dtype=torch.bool).scatter_(1, tokens, True)


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """The probability of counts as far from ``expected`` as these (Pearson's test)."""
    distance = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((counts.numel() - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, distance / 2))


def uniform(draws: Tensor) -> bool:
    """The Kolmogorov-Smirnov test of the unit interval at one in a thousand."""
    steps = torch.arange(draws.numel() + 1) / draws.numel()
    draws = draws.sort().values
    distance = max(float((steps[1:] - draws).max()), float((draws - steps[:-1]).max()))
    return distance < 1.95 / math.sqrt(draws.numel())


SETTINGS = {
    "nothing": {},
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 17},
    "top-k-of-more-than-there-are": {"top_k": 2 * V},
    "top-p": {"top_p": 0.8},
    "top-p-of-nearly-all": {"top_p": 0.9999},
    "min-p": {"min_p": 0.05},
    "penalty": {"repetition_penalty": 1.8},
    "min-length": {"min_length": 2},
    "all": {
        "temperature": 1.4,
        "top_k": 60,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.3,
        "min_length": 1,
    },
}


@pytest.mark.parametrize(
    "scale", [0.01, 3.0]
)  # all of the vocabulary, or few of its tokens, make top-p's mass
@pytest.mark.parametrize("name", SETTINGS)
def test_the_distribution_is_transformers(name: str, scale: float):
    config = SamplingConfig(**{"min_length": 0} | SETTINGS[name])
    z = logits(scale=scale)
    theirs = LogitsProcessorList()
    if config.repetition_penalty != 1:
        theirs.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.min_length:
        theirs.append(MinNewTokensLengthLogitsProcessor(3, config.min_length, END, device="cpu"))
    theirs.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        theirs.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        theirs.append(TopPLogitsWarper(config.top_p))
    if config.min_p:
        theirs.append(MinPLogitsWarper(config.min_p))
    expected = theirs(PROMPTS, z.clone()).softmax(-1)
    history = History(
        seen=seen(PROMPTS) if config.repetition_penalty != 1 else None,
        below_min_length=torch.tensor([config.min_length > 0] * 2),
        end_ids=(END,),
    )
    found = transform(z, config, history)
    torch.testing.assert_close(found.softmax(-1), expected)
    assert torch.equal(found <= MASKED_LOGIT * 1e-3, expected == 0)


def test_greedy_leaves_probabilities_alone_but_not_penalties():
    config = SamplingConfig(
        use_greedy=True, temperature=0.1, top_k=3, top_p=0.1, min_p=0.5, repetition_penalty=2.0
    )
    z = logits()
    plain = transform(z, SamplingConfig(repetition_penalty=2.0), History(seen=seen(PROMPTS)))
    assert torch.equal(transform(z, config, History(seen=seen(PROMPTS))), plain)


def test_a_taken_token_counts_as_kept():
    config, z = SamplingConfig(top_k=2, min_length=0), torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 3)
    found = transform(z, config, History(), taken=torch.tensor([0, 3, -1])).log_softmax(-1)
    kept = torch.tensor([4.0, 3.0]).log_softmax(0)
    torch.testing.assert_close(found[0, :2], kept)
    torch.testing.assert_close(found[2, :2], kept)
    torch.testing.assert_close(found[1, [0, 1, 3]], torch.tensor([4.0, 3.0, 1.0]).log_softmax(0))
    below_min_length = History(below_min_length=torch.tensor([True] * 3), end_ids=(0,))
    found = transform(z, SamplingConfig(), below_min_length, taken=torch.tensor([0, 1, 1]))
    assert (found[:, 0] == MASKED_LOGIT).tolist() == [False, True, True]


def test_gradients_are_those_of_the_kept_tokens():
    config = SamplingConfig(temperature=0.6, top_p=0.7, repetition_penalty=1.5, min_length=1)
    history = History(seen=seen(PROMPTS), below_min_length=torch.tensor([True, False]), end_ids=(END,))
    taken = torch.tensor([11, 500])

    def logprobs(z: Tensor) -> Tensor:
        return transform(z, config, history, taken=taken).log_softmax(-1).gather(1, taken[:, None])

    assert torch.autograd.gradcheck(logprobs, logits().double().requires_grad_())


@pytest.mark.parametrize("columns", [7, 256, 1000])
def test_frequencies_are_the_probabilities(columns: int):
    """100 000 draws with numbers of our own source, by chi-square; columns without probability are never drawn."""
    n = 100_000
    z = logits(1, columns=columns, scale=1.5)
    z[:, ::5] = MASKED_LOGIT
    p = z[0].double().softmax(0)
    u = random_uniforms(7, 3, number=11, sample=2, count=n)
    ids, logprobs = choose(z.expand(n, -1)[: n // 100].clone(), u[: n // 100])
    found = torch.cat([choose(z.expand(1000, -1).clone(), part)[0] for part in u.split(1000)])
    assert torch.equal(found[: ids.numel()], ids)
    torch.testing.assert_close(logprobs, p.log()[ids].float(), rtol=1e-4, atol=1e-5)
    counts = torch.bincount(found, minlength=columns)
    assert not counts[p == 0].any()
    expected, counts = p[p > 0] * n, counts[p > 0]
    rare = expected < 5
    if rare.any():
        expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
        counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    assert chi_square(counts, expected) > 1e-3


def test_the_ends_of_the_unit_interval_are_tokens_with_a_probability():
    z = torch.full((2, 600), MASKED_LOGIT)
    z[:, 100], z[:, 400] = 1.0, 2.0
    ids, _ = choose(z, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert ids.tolist() == [100, 400]


def test_the_most_likely_is_the_first_of_equals():
    z = torch.zeros(3, 600)
    z[0, 500] = z[0, 300] = 4.0
    z[1, 299] = 1e-6
    ids, logprobs = choose(z.clone(), None)
    assert ids.tolist() == [300, 299, 0]
    torch.testing.assert_close(logprobs, z.log_softmax(-1).amax(1))


def test_uniforms_are_uniform_and_apart():
    """Kolmogorov-Smirnov on each stream; neighbouring arguments give streams that have nothing in common."""
    arguments = [(1, 0, 0, 0), (1, 0, 0, 1), (1, 0, 1, 0), (1, 1, 0, 0), (2, 0, 0, 0), (-1, 0, 0, 0)]
    streams = torch.stack(
        [random_uniforms(seed, step, number=n, sample=s, count=5000) for seed, step, n, s in arguments]
    )
    assert streams.dtype == torch.float64
    assert float(streams.min()) >= 0
    assert float(streams.max()) < 1
    for stream in streams:
        assert uniform(stream)
    correlation = torch.corrcoef(streams) - torch.eye(len(arguments))
    assert float(correlation.abs().max()) < 5 / math.sqrt(5000)
    first = torch.stack([random_uniforms(1, 0, number=n, sample=0, count=1)[0] for n in range(3000)])
    assert uniform(first)
    assert torch.equal(random_uniforms(1, 0, number=0, sample=0, count=10), streams[0, :10])


def test_the_stream_is_splitmix64():
    """From the state 0 the published generator's first outputs."""
    published = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
    from nemo_aligner.models.gpt import sampling

    found = sampling.stream(0, len(published))
    assert found.tolist() == [(x >> 11) * 2.0**-53 for x in published]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": 0.0}, r"sampling\.temperature=0\.0 is not above 0"),
        ({"top_k": -1}, r"sampling\.top_k=-1 is not 0 or more"),
        ({"top_p": 1.5}, r"sampling\.top_p=1\.5 is not from 0 to 1"),
        ({"min_p": 1.0}, r"sampling\.min_p=1\.0"),
        ({"repetition_penalty": 0.0}, r"sampling\.repetition_penalty=0\.0"),
        ({"max_length": 0, "min_length": 0}, r"sampling\.max_length=0 is not 1 or more"),
        ({"min_length": 300}, r"sampling\.min_length=300 is not from 0 to max_length"),
        ({"end_strings": ("a", "")}, r"sampling\.end_strings"),
    ],
)
def test_what_means_nothing_is_refused(setting: dict, message: str):
    with pytest.raises(UserError, match=message):
        replace(SamplingConfig(), **setting).check("sampling")


def test_the_defaults_are_fine():
    SamplingConfig().check("sampling")
