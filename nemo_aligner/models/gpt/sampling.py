# SPDX-License-Identifier: Apache-2.0
"""From logits to the distribution that tokens are drawn from, and the draw. Knows no model.

Sampler and trainer call the same :func:`transform`, so that both speak of one distribution. Each tensor parallel rank
has its own columns of the vocabulary; what has to be known of all of them goes over the ranks in numbers per row.

Shapes: n rows, V columns of this rank, ``first`` of them all the number of its first one.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_aligner.batch import TokenBatch
from nemo_aligner.models.sampling_config import SamplingConfig
from nemo_aligner.parallel import world
from nemo_aligner.parallel.collectives import (
    gather_over_tensor_parallel,
    max_over_tensor_parallel,
    sum_over_tensor_parallel,
)
from nemo_aligner.parallel.vocab import Transform

# The logit of a token that can't be drawn: so far below all others that its probability is 0, and finite, as
# 0 * -inf is no number.
MASKED_LOGIT = -1e30

BLOCK = 256  # columns whose probabilities are summed before the draw looks at single ones
CANDIDATES = 256  # the most likely tokens that top_p looks at first
MASK64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, kw_only=True)
class History:
    """The text before each row's token, as far as the transform needs it; None if no setting does."""

    seen: Tensor | None = None  # [n, V] bool: the token stands in the text before
    below_min_length: Tensor | None = None  # [n] bool: the response is shorter than min_length
    end_ids: tuple[int, ...] = ()  # tokens that end a response


@dataclass(frozen=True, kw_only=True)
class SampledDistribution:
    """The distribution that a batch was sampled from: the trainer's log-probs are then those of the sampler."""

    config: SamplingConfig
    end_ids: tuple[int, ...]

    def transform(self, batch: TokenBatch, row: Tensor, position: Tensor, *, first: int) -> Transform:
        """For the head: :func:`transform` of the logits of tokens ``position`` [n] in rows ``row`` [n].

        A turn of a response begins at a loss token behind one that is none.
        """
        config, begins = self.config, _turns_begin(batch.loss_tokens())
        assert batch.cu_seqlens is None, "where a response begins in a packed row is not known"

        def call(logits: Tensor, rows: slice, taken: Tensor) -> Tensor:
            at, place = row[rows], position[rows]
            history = History(
                seen=_seen(batch.tokens[at], place, logits.shape[1], first)
                if config.repetition_penalty != 1
                else None,
                below_min_length=place - begins[at, place] < config.min_length,
                end_ids=self.end_ids,
            )
            return transform(logits, config, history, first=first, taken=taken)

        return call


def _turns_begin(mask: Tensor) -> Tensor:
    """[B, S] int64: the place of the last token of [B, S] ``mask`` up to here before which one is not in it.

    >>> _turns_begin(torch.tensor([[False, True, True, False, False, True]])).tolist()
    [[0, 1, 1, 1, 1, 5]]
    """
    first = mask & ~F.pad(mask, (1, -1))
    return torch.where(first, torch.arange(mask.shape[1], device=mask.device), 0).cummax(1).values


def _seen(tokens: Tensor, place: Tensor, width: int, first: int) -> Tensor:
    """[c, width] bool: which columns' tokens stand in [c, S] ``tokens`` before ``place`` [c]."""
    column = tokens - first
    before = torch.arange(tokens.shape[1], device=tokens.device) < place[:, None]
    column = column.where(before & (column >= 0) & (column < width), width)
    seen = torch.zeros(tokens.shape[0], width + 1, dtype=torch.bool, device=tokens.device)
    return seen.scatter_(1, column, True)[:, :width]


def transform(
    logits: Tensor, config: SamplingConfig, history: History, *, first: int = 0, taken: Tensor | None = None
) -> Tensor:
    """[n, V] float logits -> [n, V] float: their softmax over all columns is what tokens are drawn from.

    In the order of transformers' generate: repetition penalty (Keskar 2019, arXiv 1909.05858, 4.1: a positive logit is
    divided by it, a negative one multiplied), min_length, temperature, top-k, top-p (Holtzman 2020, arXiv 1904.09751;
    on what top-k has left), min-p (Nguyen 2024, arXiv 2407.01082). What is left out gets :data:`MASKED_LOGIT`. Where
    two tokens are equally likely, both are kept or none. Differentiable; which tokens are kept is taken as given.

    Args:
        taken: [n] int64 columns here (-1: another rank's) of tokens that count as kept whatever their logits, for
            log-probs of text: a token on the border, of which two roundings disagree whether it belongs to the kept,
            then has the probability it was drawn with, and one far outside has a small one, never 0.
    """
    z = logits
    if history.seen is not None:
        z = z.where(
            ~history.seen, torch.where(z > 0, z / config.repetition_penalty, z * config.repetition_penalty)
        )
    if history.below_min_length is not None:
        z = _without_ends(z, history.below_min_length, history.end_ids, first, taken)
    if config.scale != 1:
        z = z / config.scale
    if config.truncates:
        # One number per row, the largest of what each setting asks for, as all of them keep the most likely tokens.
        out = z < _least_kept(z.detach(), config)[:, None]
        z = z.masked_fill(_but_taken(out, taken), MASKED_LOGIT)
    return z


def _without_ends(
    z: Tensor, below_min_length: Tensor, end_ids: tuple[int, ...], first: int, taken: Tensor | None
) -> Tensor:
    columns = [i - first for i in end_ids if first <= i < first + z.shape[1]]
    if not columns or not bool(below_min_length.any()):
        return z
    out = torch.zeros_like(z, dtype=torch.bool)
    out[:, columns] = below_min_length[:, None]
    return z.masked_fill(_but_taken(out, taken), MASKED_LOGIT)


def _but_taken(out: Tensor, taken: Tensor | None) -> Tensor:
    if taken is None or out.shape[1] == 0:
        return out
    column = taken.clamp(min=0)[:, None]
    return out.scatter(1, column, out.gather(1, column) & (taken < 0)[:, None])


@torch.no_grad()
def _least_kept(z: Tensor, config: SamplingConfig) -> Tensor:
    """[n]: the smallest logit that top-k, top-p and min-p keep."""
    floors = []
    if config.min_p > 0:
        floors.append(_largest(z, 1)[:, 0] + torch.tensor(config.min_p, dtype=z.dtype).log().item())
    best = None
    if config.top_k > 0:
        best = _largest(z, config.top_k)
        floors.append(best[:, -1])
    if 0 < config.top_p < 1:
        floors.append(_nucleus(z, best, config.top_p))
    return torch.stack(floors).amax(0)


def _largest(z: Tensor, k: int) -> Tensor:
    """[n, k]: the largest logits over all ranks, descending; where there are fewer, the last ones are MASKED_LOGIT."""
    mine = z.topk(min(k, z.shape[1]), dim=1).values
    mine = F.pad(mine, (0, k - mine.shape[1]), value=MASKED_LOGIT)
    return gather_over_tensor_parallel(mine).topk(k, dim=1).values


def _nucleus(z: Tensor, best: Tensor | None, p: float) -> Tensor:
    """[n]: the smallest logit of the fewest tokens whose probability is p at least.

    ``best`` [n, k], descending, is all that may be kept; where it is None more and more of the vocabulary is looked at.
    """
    total = _log_normaliser(z) if best is None else best.logsumexp(1)
    candidates = _largest(z, CANDIDATES) if best is None else best
    while True:
        mass = (candidates - total[:, None]).double().exp().cumsum(1)
        if best is not None or bool(((mass[:, -1] >= p) | (candidates[:, -1] < MASKED_LOGIT * 1e-6)).all()):
            break
        candidates = _largest(z, 4 * candidates.shape[1])
    last = (mass < p).sum(1).clamp(max=candidates.shape[1] - 1)
    return candidates.gather(1, last[:, None])[:, 0]


def _log_normaliser(z: Tensor) -> Tensor:
    """[n]: the logarithm of the sum over all ranks' columns of exp(z)."""
    mine = z.logsumexp(1)
    if world.tp_size() == 1:
        return mine
    most = max_over_tensor_parallel(mine.clone())
    return most + sum_over_tensor_parallel((mine - most).exp()).log()


def choose(logits: Tensor, uniform: Tensor | None, *, first: int = 0) -> tuple[Tensor, Tensor]:
    """One token of each row, and its log-prob.

    Args:
        logits: [n, V] float, transformed; as many columns on every rank. Overwritten.
        uniform: [n] float64 in [0, 1): the token is taken at which the cumulative probability, in the order of ids,
            passes it. None takes the most likely token, of equal ones the first.

    Returns:
        ids [n] int64 and log-probs [n] float, the same on every tensor parallel rank.
    """
    if uniform is None:
        column, mine = _most_likely(logits)
        p = _softmax_(logits)
    else:
        p = _softmax_(logits)
        column, mine = _passed(p, uniform)
    logprob = p.gather(1, column[:, None])[:, 0].double().log()
    found = torch.stack(((column + first).double(), logprob)).where(mine, 0.0)
    ids, logprobs = sum_over_tensor_parallel(found)
    return ids.long(), logprobs.float()


def _softmax_(z: Tensor) -> Tensor:
    """The softmax over all ranks' columns, in the place of ``z``."""
    if world.tp_size() == 1:
        return torch.softmax(z, 1, out=z)
    return z.sub_(_log_normaliser(z)[:, None]).exp_()


def _blocks(x: Tensor, *, padding: float) -> Tensor:
    """[n, V] -> [n, ceil(V / BLOCK), BLOCK]. What stands in blocks is found in two steps, each over few numbers."""
    if short := -x.shape[1] % BLOCK:
        x = F.pad(x, (0, short), value=padding)
    return x.view(x.shape[0], -1, BLOCK)


def _most_likely(z: Tensor) -> tuple[Tensor, Tensor]:
    """[n] columns here of the largest logits, and [n] bool whether that is the largest of all ranks."""
    blocks = _blocks(z, padding=MASKED_LOGIT)
    peaks = blocks.amax(2)
    block = peaks.argmax(1)
    rows = torch.arange(z.shape[0], device=z.device)
    column = block * BLOCK + blocks[rows, block].argmax(1)
    if world.tp_size() == 1:
        return column, torch.ones_like(column, dtype=torch.bool)
    winner = gather_over_tensor_parallel(peaks[rows, block][:, None]).argmax(1)
    return column, winner == world.tp_rank()


def _passed(p: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """[n] columns here at which the cumulative probability passes ``uniform``, and [n] bool whether it is here."""
    blocks = _blocks(p, padding=0.0)
    mass = gather_over_tensor_parallel(blocks.sum(2)).double()
    ends = mass.cumsum(1)
    target = uniform[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp_(max=ends.shape[1] - 1)
    rest = target - (ends - mass).gather(1, block)
    here = block[:, 0] - world.tp_rank() * blocks.shape[1]
    mine = (here >= 0) & (here < blocks.shape[1])
    here = here.where(mine, 0)
    within = blocks[torch.arange(p.shape[0], device=p.device), here].double().cumsum(1)
    # A block's sum rounds otherwise than that of its columns; the last column with a probability must not be passed.
    rest = torch.minimum(rest, within[:, -1:] * (1 - 1e-12))
    column = here * BLOCK + torch.searchsorted(within, rest, right=True)[:, 0]
    return column.clamp_(max=p.shape[1] - 1), mine


def random_uniforms(seed: int, step: int, *, number: int, sample: int, count: int) -> Tensor:
    """[count] float64 in [0, 1) for the first ``count`` tokens of one response, a function of the arguments alone.

    SplitMix64 (Steele, Lea and Flood 2014): a stream per response, a number of it per position.

    Args:
        step: of training.
        number: the prompt's.
        sample: which of the responses to it.
    """
    key = 0
    for word in (seed, step, number, sample):
        key = _mixed(key ^ _mixed(word & MASK64))
    return stream(key, count)


def stream(key: int, count: int) -> Tensor:
    """[count] float64 in [0, 1): SplitMix64's first outputs from the state ``key``, 53 bits of each."""
    x = torch.arange(1, count + 1, dtype=torch.int64) * _signed(GOLDEN) + _signed(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    x = x ^ _shifted(x, 31)
    return _shifted(x, 11).double() * 2.0**-53


def _mixed(x: int) -> int:
    x = (x + GOLDEN) & MASK64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK64
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    """The int64 with the same bits, whose products wrap around as unsigned ones do."""
    return x - (1 << 64) if x >> 63 else x


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits of unsigned numbers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
