# SPDX-License-Identifier: Apache-2.0
"""A second set of weights for a model: the initial policy beside the actor, the reward model beside the critic."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from nemo_aligner.parallel import world


class SwappedWeights:
    """The weights that a model has now, of those that are trained, kept in CPU memory for later."""

    @torch.no_grad()
    def __init__(self, model: nn.Module) -> None:
        self._weights = {name: _host_copy(weight) for name, weight in _trained(model)}
        self._kept: dict[str, Tensor] = {}  # where a device's own weights wait meanwhile
        self._kept_is_stale = True

    @contextlib.contextmanager
    @torch.no_grad()
    def swapped(self, model: nn.Module, *, changed: bool = True) -> Iterator[None]:
        """Within it, ``model`` has these weights; its own are back afterwards, bit for bit.

        In CPU memory, and on a device that has room, both sets stay where they are. Else they are copied.

        Args:
            changed: whether the model's own weights may be others than when they were last swapped; if they are not,
                their copy in CPU memory still holds.
        """
        self._kept_is_stale |= changed
        moved: dict[str, Tensor] = {}
        beside = _has_room(self._weights.values())
        for name, param in _trained(model):
            if beside or not _exchangeable(param, self._weights[name]):
                moved[name] = param.data
                param.data = self._weights[name].to(param.device, non_blocking=True)
            else:
                if self._kept_is_stale:
                    self._kept[name] = _host_copy(param, into=self._kept.get(name))
                param.data.copy_(self._weights[name], non_blocking=True)
        self._kept_is_stale &= beside
        try:
            yield
        finally:
            for name, param in _trained(model):
                if name in moved:
                    param.data = moved[name]
                else:
                    param.data.copy_(self._kept[name], non_blocking=True)


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]


def _has_room(weights: Iterable[Tensor]) -> bool:
    """True if the device holds these too and keeps a fifth of its memory free for what is computed with them."""
    memory = world.free_memory()
    return memory is not None and memory[0] - sum(x.nbytes for x in weights) > memory[1] / 5


def _exchangeable(param: nn.Parameter, other: Tensor) -> bool:
    """True if weights are copied into the parameter's place; else the parameter is led to another place."""
    return param.device.type != "cpu" and param.shape == other.shape


def _host_copy(x: Tensor, *, into: Tensor | None = None) -> Tensor:
    if into is None:
        # Pinned memory is copied to and from a device at full speed.
        into = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type != "cpu")
    return into.copy_(x.detach())
