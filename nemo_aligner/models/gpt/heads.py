# SPDX-License-Identifier: Apache-2.0
"""The head of reward models and critics: hidden states to a few numbers, whole on every tensor parallel rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_aligner.errors import UserError
from nemo_aligner.parallel import world

HEAD_NAME = "rm_head"  # as NeMo's reward models save it
# Of a model_config.yaml, what describes a head and what is made of its numbers.
HEAD_KEYS = (
    "reward_model_type",
    "regression",
    "reward_standardization",
    "use_avg_pool",
    "force_head_dtype",
    "output_sequence",
    "data",
)
# By model.force_head_dtype, in its spelling or in trainer.precision's.
HEAD_DTYPES = {
    **dict.fromkeys(("float32", "32", "fp32"), torch.float32),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
    **dict.fromkeys(("float16", "16", "fp16"), torch.float16),
}


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The outputs of a scalar head."""

    outputs: int = 1  # numbers of a position
    dtype: torch.dtype = torch.float32  # of its product; its weights have the model's
    average: bool = False  # a sequence's reward: from the mean of its hidden states, not from the last one


def head_config(config: Mapping[str, Any]) -> HeadConfig | None:
    """The head that a model_config.yaml describes; None of a language model's."""
    kind = config.get("reward_model_type")
    if kind is None:
        return None
    if kind not in ("binary_ranking", "regression"):
        raise UserError(
            f"model.reward_model_type={kind} is not known", fix="set it to binary_ranking or regression"
        )
    if (dtype := str(config.get("force_head_dtype") or "float32")) not in HEAD_DTYPES:
        raise UserError(
            f"model.force_head_dtype={dtype} is not known", fix=f"set it to one of {', '.join(HEAD_DTYPES)}"
        )
    regression = config.get("regression") or {}
    return HeadConfig(
        outputs=int(regression.get("num_attributes", 1)) if kind == "regression" else 1,
        dtype=HEAD_DTYPES[dtype],
        average=bool(config.get("use_avg_pool", False)),
    )


class ScalarHead(nn.Module):
    """A linear layer with a bias, whose product has a dtype of its own.

    The weights are stored as the model's are: Megatron's optimizer mixes up the state of a group with two dtypes.
    """

    def __init__(self, head: HeadConfig, config: TransformerConfig) -> None:
        super().__init__()
        self.head, self.sequence_parallel = head, config.sequence_parallel
        self.std = config.init_method_std
        options = {"dtype": config.params_dtype, "device": world.device()}
        self.weight = nn.Parameter(torch.empty(head.outputs, config.hidden_size, **options))
        self.bias = nn.Parameter(torch.zeros(head.outputs, **options))

    @torch.no_grad()
    def draw(self, *, seed: int, std: float) -> None:
        """New weights, the same on every rank and at every layout: N(0, std), the bias 0."""
        draw = torch.Generator().manual_seed(seed)
        self.weight.copy_(torch.randn(self.weight.shape, generator=draw) * std)
        self.bias.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., outputs] float32."""
        dtype = self.head.dtype
        return F.linear(hidden.to(dtype), self.weight.to(dtype), self.bias.to(dtype)).float()


def draw_head(model: nn.Module, *, seed: int) -> None:
    """Give the head, on the ranks that have one, new weights of the model's own scale."""
    for module in model.modules():
        if isinstance(module, ScalarHead):
            module.draw(seed=seed, std=module.std)


@torch.no_grad()
def fold_head(model: nn.Module, *, weights: Sequence[float], mean: float, std: float) -> None:
    """Have the head, on the ranks that have one, give ``(x @ weights - mean) / std`` by itself: one number for many."""
    for module in model.modules():
        if isinstance(module, ScalarHead):
            mix = torch.tensor(weights, dtype=torch.float64, device=module.weight.device)
            weight = (mix @ module.weight.double())[None] / std
            bias = ((mix * module.bias.double()).sum()[None] - mean) / std
            module.weight = nn.Parameter(weight.to(module.weight.dtype))
            module.bias = nn.Parameter(bias.to(module.bias.dtype))
            module.head = replace(module.head, outputs=1)
