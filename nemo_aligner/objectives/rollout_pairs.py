# SPDX-License-Identifier: Apache-2.0
"""Pairs of the responses of a rollout: of each prompt the one of the highest reward, and the one of the lowest."""

import torch
from torch import Tensor

from nemo_aligner.batch import ReferencedPairs
from nemo_aligner.rollout_batch import ScoredRollout


def best_and_worst(rewards: Tensor, group: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
    """Return ([G, 2] the responses of the highest and of the lowest reward of each group, [G] whether they differ).

    Of equal rewards the first. Groups are in the order of their numbers.

    Args:
        rewards: [N] float.
        group: [N] int64, alike for responses to one prompt.
        usable: [N] bool: which responses may be in a pair.

    >>> rewards, group = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0]), torch.tensor([7, 7, 7, 9, 9])
    >>> best_and_worst(rewards, group, torch.tensor([True, True, True, True, True]))
    (tensor([[1, 0],
            [3, 3]]), tensor([ True, False]))
    """
    pairs: list[tuple[int, int]] = []
    for number in sorted({int(number) for number in group}):
        rows = torch.nonzero(group == number).flatten()
        # Without usable responses, one is paired with itself: such a pair has no loss.
        rows = rows[usable[rows]] if usable[rows].any() else rows[:1]
        pairs.append((int(rows[rewards[rows].argmax()]), int(rows[rewards[rows].argmin()])))
    found = torch.tensor(pairs)
    return found, rewards[found[:, 0]] > rewards[found[:, 1]]


def rollout_pairs(scored: ScoredRollout, *, initial: bool, mask_unfinished: bool) -> ReferencedPairs:
    """Return a pair for each prompt, in the order of the prompts' numbers; one of equal rewards has no loss.

    Direct preference optimization of a policy's own responses (Guo 2024, arXiv 2402.04792).

    Args:
        initial: the reference is the initial policy, which the rollout was scored by; else the policy that wrote it.
        mask_unfinished: responses that the length limit cut are in no pair.
    """
    usable = scored.finished if mask_unfinished else torch.ones_like(scored.finished)
    rows, differ = best_and_worst(scored.rewards, scored.group, usable)
    reference = scored.per_sequence(scored.reference_logprobs if initial else scored.logprobs)
    taken, real = rows.flatten(), differ.repeat_interleave(2)
    return ReferencedPairs(
        tokens=scored.tokens[taken],
        loss_mask=scored.loss_tokens()[taken] & real[:, None],
        lengths=scored.lengths[taken],
        given_rewards=scored.rewards[taken],
        reference_sums=reference[taken],
    )
