# SPDX-License-Identifier: Apache-2.0
"""AdamW on torch's fused kernel whose step count lives in the parameter group, as apex's and TE's FusedAdam keep it."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import distrib_optimizer
from torch import Tensor
from torch.optim.adamw import adamw

C = TypeVar("C", bound=Callable[..., Any])


def _undecorated(method: C) -> C:
    """Without torch's decorator, which imports torch._dynamo: a second and 24 MB for every rank, for nothing."""
    return getattr(method, "__wrapped__", method)


class GroupStepAdamW(torch.optim.Optimizer):
    """torch's AdamW with one step count for a group, where torch has a tensor for each parameter.

    Megatron's distributed optimizer saves and loads moments only; it finds the step in the group.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode, "weight decay is decoupled"
        assert not capturable, "the step count is no tensor"
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    add_param_group = _undecorated(torch.optim.Optimizer.add_param_group)
    state_dict = _undecorated(torch.optim.Optimizer.state_dict)
    load_state_dict = _undecorated(torch.optim.Optimizer.load_state_dict)
    zero_grad = _undecorated(torch.optim.Optimizer.zero_grad)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step for every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            state = [self._state(p) for p in params]
            adamw(
                params,
                [p.grad for p in params],
                [s["exp_avg"] for s in state],
                [s["exp_avg_sq"] for s in state],
                [],
                # The kernel counts them up itself.
                [torch.tensor(group["step"] - 1.0, device=p.device) for p in params],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state


def replace_torch_adamw() -> None:
    """Have Megatron take :class:`GroupStepAdamW` where it would fall back to torch's AdamW."""
    if megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        megatron_optimizer.Adam = distrib_optimizer.Adam = GroupStepAdamW
        megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
        # What these two ask for is where the step count lives: in the group.
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
