# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): ``x W^T + s (x A^T) B^T`` with ``W`` as it was.

Each of Hugging Face's projections has an A and a B of its own, though Megatron computes several as one: q, k and v,
gate and up. Shapes: r the rank, [r, in] of A, [out, r] of B.

Over tensor parallel ranks A of a layer whose outputs are cut is whole, and B is cut; where inputs are cut, A is cut and
B whole. What is whole has the same numbers and, after Megatron's sums, the same gradient on each rank.
"""

import contextlib
import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from nemo_aligner.models.gpt.heads import HEAD_NAME
from nemo_aligner.models.gpt.peft_config import LoRAConfig
from nemo_aligner.models.gpt.projections import Projections
from nemo_aligner.parallel import world

ADAPTERS = "adapters"  # name of the submodule that a linear layer gets


class Adapters(nn.Module):
    """Adapters of one linear layer: an A and a B for each projection, in the order of the layer's outputs.

    The parameters are this module's own: Megatron gathers late what a module has when the module is called.

    Args:
        lora: rank, scale and dropout.
        projections: the layer's.
        pairs: A and B of each projection, or this rank's parts of them.
    """

    def __init__(
        self,
        lora: LoRAConfig,
        projections: Projections,
        pairs: Sequence[tuple[Tensor, Tensor]],
        config: TransformerConfig,
    ) -> None:
        super().__init__()
        self.lora, self.projections = lora, projections
        self.cuts_input, self.sequence_parallel = projections.cuts_input, config.sequence_parallel
        for name, (a, b) in zip(projections.names, pairs, strict=True):
            self.register_parameter(f"{name}_a", nn.Parameter(a))
            self.register_parameter(f"{name}_b", nn.Parameter(b))
        for a, b in self.pairs():
            cut, whole = (a, b) if self.cuts_input else (b, a)
            tensor_parallel.set_tensor_model_parallel_attributes(cut, True, int(self.cuts_input), 1)
            # Where each rank has some positions only, Megatron sums the gradient over them.
            setattr(whole, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - torch types no such name

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """A and B of each projection."""
        return [(getattr(self, f"{name}_a"), getattr(self, f"{name}_b")) for name in self.projections.names]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]: the term to add to the linear layer's output."""
        if self.lora.adapter_dropout and self.training:
            own_draws = world.tp_size() > 1 and (self.cuts_input or self.sequence_parallel)
            tracker: Any = tensor_parallel.get_cuda_rng_tracker()
            with tracker.fork() if own_draws else contextlib.nullcontext():
                x = F.dropout(x, self.lora.adapter_dropout)
        pairs = self.pairs()
        low = self._over_ranks(F.linear(x, torch.cat([a for a, _ in pairs])) * self.lora.scale)
        parts = low.split(self.lora.adapter_dim, dim=-1)
        return self.projections.arranged(
            [F.linear(part, b) for part, (_, b) in zip(parts, pairs, strict=True)]
        )

    def _over_ranks(self, low: Tensor) -> Tensor:
        """[..., r], summed, gathered or copied over tensor parallel ranks between the products with A and with B."""
        if world.tp_size() == 1:
            return low
        if self.cuts_input and self.sequence_parallel:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(low)
        if self.cuts_input:
            return tensor_parallel.reduce_from_tensor_model_parallel_region(low)
        if self.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True)
        return tensor_parallel.copy_to_tensor_model_parallel_region(low)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """[out, in]: the layer's weight, or this rank's part of it, with what the adapters add."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        added = self.projections.arranged([b.to(wide) @ a.to(wide) for a, b in self.pairs()], dim=0)
        return (weight.to(wide) + added * self.lora.scale).to(weight.dtype)

    def sharded_state_dict(self, prefix: str, sharded_offsets: tuple[Any, ...]) -> dict[str, Any]:
        """Megatron's sharded tensors."""
        end, axis = ("a", 1) if self.cuts_input else ("b", 0)
        cut = {f"{name}_{end}": axis for name in self.projections.names}
        own = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(own, prefix, cut, sharded_offsets)


@functools.cache
def _adapted(linear: Any) -> type:  # noqa: ANN401 - a class of Megatron's, or ours
    """Return a subclass of ``linear`` that adds its adapters' output."""

    def forward(self: Any, x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401
        out, bias = linear.forward(self, x, *args, **options)
        return out + getattr(self, ADAPTERS)(x), bias

    def sharded_state_dict(
        self: Any,  # noqa: ANN401 - Megatron's
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        own = linear.sharded_state_dict(self, prefix, sharded_offsets, metadata)
        adapters: Adapters = getattr(self, ADAPTERS)
        return own | adapters.sharded_state_dict(f"{prefix}{ADAPTERS}.", sharded_offsets)

    return type(linear.__name__, (linear,), {"forward": forward, "sharded_state_dict": sharded_state_dict})


def adapters_of(module: nn.Module) -> Iterator[Adapters]:
    """Those of each linear layer that has some."""
    return (one for one in module.modules() if isinstance(one, Adapters))


def is_adapted(model: nn.Module) -> bool:
    """True if a model has adapters, and other weights that are not trained."""
    return next(adapters_of(model), None) is not None


def add_adapters(model: nn.Module, lora: LoRAConfig, *, seed: int) -> None:
    """Freeze all of a GPT but its head of rewards, and give its linear layers adapters, whose B is 0.

    A is the same at every layout.

    Args:
        model: a GPT, or the parts of one.
        seed: of the draws.

    Raises:
        UserError: the layout cuts keys and values in a way that adapters of q, k and v cannot follow.
    """
    for name, weight in model.named_parameters():
        weight.requires_grad_(HEAD_NAME in name.split("."))
    config = cast(TransformerConfig, model.config)
    for layer in [layer for chunk in cast(Any, model).chunks for layer in chunk.decoder.layers]:
        for place in lora.linears:
            linear = layer.get_submodule(place)
            adapters = _adapters_for(lora, linear, place, config, seed=f"{seed} {layer.layer_number} {place}")
            setattr(linear, ADAPTERS, adapters)
            # The class is changed, not wrapped: Megatron's names, sharded states and hooks stay (ADR 16).
            linear.__class__ = _adapted(type(linear))


def _adapters_for(
    lora: LoRAConfig,
    linear: Any,  # noqa: ANN401 - Megatron's
    place: str,
    config: TransformerConfig,
    *,
    seed: str,
) -> Adapters:
    """The adapters of a linear layer."""
    size, rank, weight = world.tp_size(), world.tp_rank(), linear.weight
    outputs, columns = weight.shape
    projections, options = (
        Projections.of(outputs, place, config),
        {"dtype": weight.dtype, "device": weight.device},
    )
    pairs = []
    for name, rows in zip(projections.names, projections.rows, strict=True):
        digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        a = _draw_a(lora, columns * size if projections.cuts_input else columns, draw)
        if projections.cuts_input:
            a = a[:, rank * columns : (rank + 1) * columns]
        pairs.append((a.to(**options), torch.zeros(rows, lora.adapter_dim, **options)))
    return Adapters(lora, projections, pairs, config)


def _draw_a(lora: LoRAConfig, width: int, draw: torch.Generator) -> Tensor:
    """[r, width] float32, a new A."""
    shape = (lora.adapter_dim, width)
    if lora.column_init_method == "kaiming":
        return (torch.rand(shape, generator=draw) * 2 - 1) / math.sqrt(width)
    return torch.randn(shape, generator=draw) * math.sqrt(2 / (lora.adapter_dim + width))
