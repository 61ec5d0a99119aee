# SPDX-License-Identifier: Apache-2.0
"""Responses and their scores. Every rank holds the whole rollout, in the order of its prompts, so that the
update does not depend on how it was generated; only the work is split over ranks.

Shapes: N responses of all ranks, S positions.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from nemo_aligner.algorithms.ppo_config import RolloutConfig
from nemo_aligner.algorithms.skips import check_finite
from nemo_aligner.batch import TokenBatch, concatenated
from nemo_aligner.data.loader import BatchLoader
from nemo_aligner.data.row import Row
from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface, Turns
from nemo_aligner.models.sampling_config import SamplingConfig
from nemo_aligner.parallel import collectives, world
from nemo_aligner.rollout_batch import Prompt, Rollout

logger = logging.getLogger(__name__)

B = TypeVar("B", bound=TokenBatch)


PromptSource = BatchLoader[list[Row]]
"""Prompts by rollout: each data parallel rank has a run of them, one to a micro-batch, the first rank the first run."""


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """The sizes of a rollout, and of the work on it."""

    config: RolloutConfig
    num_rows: int  # rows of data that a rollout gives: responses, or pairs of them
    sampling: SamplingConfig
    global_batch_size: int  # rows of an optimizer step
    micro_batch_size: int  # of a forward and backward pass on one rank
    length_multiple: int  # of positions that rows are padded to
    seed: int  # of the order of rows within an update
    decode: Callable[[Sequence[int]], str]  # token ids to text
    end_ids: Sequence[int]  # tokens that end a response

    def response_text(self, rollout: Rollout, row: int) -> str:
        """The text of a response, without what ended it."""
        return text_of_response(rollout, row, self.end_ids, self.sampling.end_strings, decode=self.decode)

    def warn_of_cut(self, rollout: Rollout) -> None:
        """Warn if no response of ``rollout`` has ended by itself: with mask_unfinished none is trained on."""
        if rollout.finished.any() or not world.is_logging_rank():
            return
        ends = [self.decode([i]) for i in self.end_ids] + list(self.sampling.end_strings)
        logger.warning(
            "none of the %d responses of this rollout ended by itself, all were cut at their longest; what ends a "
            "response: %s. Set model.ppo.length_params.max_length, now %d, higher; or name the text that it ends "
            "its turns with in model.ppo.sampling_params.end_strings; or start from a model that was fine-tuned to end",
            *(rollout.num_rows, ", ".join(map(repr, ends)), self.sampling.max_length),
        )


def text_of_response(
    rollout: Rollout,
    row: int,
    end_ids: Sequence[int],
    end_strings: Sequence[str],
    *,
    decode: Callable[[Sequence[int]], str],
) -> str:
    """The text of the response in a row, without the end token or the end string that ended it."""
    tokens = rollout.response(row)
    if not rollout.finished[row]:
        return decode(tokens)
    return text_of_turn(tokens, end_ids, end_strings, decode=decode)


def text_of_turn(
    tokens: Sequence[int],
    end_ids: Sequence[int],
    end_strings: Sequence[str],
    *,
    decode: Callable[[Sequence[int]], str],
) -> str:
    """The text of what has ended by itself, without the end token or the end string that ended it."""
    if tokens[-1] in end_ids:
        return decode(tokens[:-1])
    text = decode(tokens)
    # The last token completed the string; what stands before may hold others, as min_length has it.
    before = len(decode(tokens[:-1]).rstrip("\ufffd"))
    starts = [text.find(end, max(0, before - len(end) + 1)) for end in end_strings]
    return text[: min((start for start in starts if start >= 0), default=len(text))]


def balance_micro_batches(lengths: Sequence[int], *, rows: int, ranks: int) -> list[list[list[int]]]:
    """[rank][micro-batch][row]: micro-batches of rows of like length, dealt out so that each rank has as many tokens.

    All ranks get equally many micro-batches; the last ones may be short or empty.

    >>> balance_micro_batches([5, 9, 7, 1], rows=1, ranks=2)
    [[[1], [3]], [[2], [0]]]
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    micro_batches = [order[i : i + rows] for i in range(0, len(order), rows)]
    micro_batches += [[]] * (-len(micro_batches) % ranks)
    shares: list[list[list[int]]] = [[] for _ in range(ranks)]
    for turn in range(0, len(micro_batches), ranks):
        # There and back: whoever got the longest of one turn gets the shortest of the next.
        step = 1 if turn // ranks % 2 == 0 else -1
        for share, micro_batch in zip(shares[::step], micro_batches[turn : turn + ranks], strict=True):
            share.append(micro_batch)
    return shares


def gather_rollouts(
    policy: AlignableGenerativeInterface,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    *,
    draw: int,
    slots: int,
    seq_length: int | None,
    turns: Turns | None = None,
) -> Rollout:
    """The responses to all ranks' prompts, in the order of ranks.

    Args:
        prompts: this data parallel rank's.
        draw: with it the responses' random numbers change.
        slots: responses that a rank generates at once.
        seq_length: the least S; None: the longest row's.
        turns: replies to the policy's turns; None: a response is one turn.

    Raises:
        NotFinite: a log-prob is infinite or NaN.
    """
    with world.phase("generation"), world.at_own_pace():
        mine = policy.generate(prompts, sampling, step=draw, slots=slots, turns=turns)
    with world.phase("gathering responses"):
        rollout = concatenated(collectives.all_gather_objects_dp(mine))
    fix = "set model.optim.lr lower; with trainer.precision=16 try bf16 or 32"
    check_finite({"sampler's log-probs": rollout.sampler_logprobs[rollout.loss_mask]}, fix=fix)
    longest = int(rollout.lengths.max())
    if seq_length is not None and longest > seq_length and world.is_logging_rank():
        logger.warning(
            "a prompt and its response have %d tokens, more than trainer.ppo.rollout_batch_seq_length=%d: "
            "the rollout is padded to %d",
            *(longest, seq_length, longest),
        )
    return rollout.with_length(max(seq_length or 0, longest))


def per_token_over_ranks(
    rollout: TokenBatch, ask: Callable[[TokenBatch], Tensor], *, rows: int, multiple: int
) -> Tensor:
    """[N, S] on every rank, on the CPU: what ``ask`` says of each token, the work dealt out over data parallel ranks.

    Args:
        ask: [b, s] of a micro-batch; read on the last pipeline stage.
        rows: of a micro-batch.
        multiple: of positions that a micro-batch is padded to.
    """
    whole = torch.zeros(rollout.tokens.shape)
    shares = balance_micro_batches(lengths_of(rollout), rows=rows, ranks=world.dp_size())
    for micro_batch in shares[world.dp_rank()]:
        # All ranks ask equally often: where one has no rows left, it asks about the first ones for nothing.
        part = trim_padding(rollout.take(micro_batch or [0]), multiple=multiple).to(world.device())
        found = ask(part)
        shape = tuple(part.tokens.shape)
        found = collectives.broadcast_from_last_stage(found if world.is_last_stage() else None, shape).cpu()
        if micro_batch:
            width = min(part.seq_length, rollout.seq_length)
            whole[micro_batch, :width] = found[:, :width].float()
    return collectives.sum_over_data_parallel(whole.to(world.device())).cpu()


def trim_padding(batch: B, *, multiple: int, longest: int | None = None) -> B:
    """The batch without the columns that hold padding only, up to a multiple."""
    longest = longest or int(batch.lengths.max())
    return batch.with_length(-(-longest // multiple) * multiple)


def lengths_of(batch: TokenBatch) -> list[int]:
    """The tokens in each row."""
    return [int(length) for length in batch.lengths]
