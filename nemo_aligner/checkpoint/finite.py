# SPDX-License-Identifier: Apache-2.0
"""Weights that are infinite or NaN are neither saved nor loaded nor converted."""

import torch
from torch import Tensor, nn

from nemo_aligner.errors import UserError
from nemo_aligner.parallel import collectives


def is_finite(tensors: list[Tensor]) -> bool:
    """True if every number is; the device is waited for once.

    >>> is_finite([torch.ones(2), torch.tensor([3e38, -3e38])]), is_finite([torch.ones(2), torch.tensor(float("nan"))])
    (True, False)
    """
    # The extremes carry NaN along, can't overflow and make no copy: a tenth of a copy's time.
    extremes = [end for x in tensors if x.numel() for end in torch.aminmax(x.detach())]
    return not extremes or bool(torch.stack([end.double() for end in extremes]).isfinite().all())


def refuse_non_finite(model: nn.Module, *, problem: str, fix: str, but: str | None = None) -> None:
    """Raise UserError if any weight is infinite or NaN on any rank. Called by every rank.

    Args:
        problem: what is wrong then; the name of a weight follows.
        but: the name of a module that is not looked at.

    Raises:
        UserError: on every rank.
    """
    weights = {
        name: weight for name, weight in model.named_parameters() if but is None or but not in name.split(".")
    }
    fine = is_finite(list(weights.values()))
    (found,) = collectives.all_reduce_max([not fine])
    if found:
        mine = next((name for name, weight in weights.items() if not is_finite([weight])), None)
        name = next(name for name in collectives.of_all_ranks(mine) if name is not None)
        raise UserError(f"{problem}: {name} is not finite", fix=fix)
