# SPDX-License-Identifier: Apache-2.0
"""A second set of weights for a model: the initial policy beside the actor, the reward model beside the critic."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["SpareWeights"]


class SpareWeights:
    """The weights that a model has now, kept in CPU memory for later."""

    @torch.no_grad()
    def __init__(self, model: nn.Module) -> None:
        self._spare = {name: _host_copy(param) for name, param in model.named_parameters()}
        self._kept: dict[str, Tensor] = {}  # where a device's own weights wait meanwhile

    @contextlib.contextmanager
    @torch.no_grad()
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Within it, ``model`` has these weights; its own are back afterwards, bit for bit.

        In CPU memory both sets stay where they are. On a device there is room for one, so they are copied.
        """
        moved: dict[str, Tensor] = {}
        for name, param in model.named_parameters():
            if _exchangeable(param, self._spare[name]):
                self._kept[name] = _host_copy(param, into=self._kept.get(name))
                param.data.copy_(self._spare[name])
            else:
                moved[name] = param.data
                param.data = self._spare[name].to(param.device)
        try:
            yield
        finally:
            for name, param in model.named_parameters():
                if name in moved:
                    param.data = moved[name]
                else:
                    param.data.copy_(self._kept[name])


def _exchangeable(param: nn.Parameter, spare: Tensor) -> bool:
    """Whether weights are copied into the parameter's place; else the parameter is led to another place."""
    return param.device.type != "cpu" and param.shape == spare.shape


def _host_copy(x: Tensor, *, into: Tensor | None = None) -> Tensor:
    if into is None:
        # Pinned memory is copied to and from a device at full speed.
        into = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type != "cpu")
    return into.copy_(x.detach())
