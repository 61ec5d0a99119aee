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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.peft_config import LINEARS, PROJECTIONS, LoRAConfig
from nemo_aligner.parallel import world

ADAPTERS = "adapters"  # of a linear layer's, among its modules


class Adapters(nn.Module):
    """Those of a linear layer's projections, in the order in which its outputs hold them.

    The parameters are this module's own: Megatron gathers late what a module has when the module is called.

    Args:
        lora: rank, scale and dropout.
        pairs: A and B of each projection, or this rank's parts of them.
        cuts_input: whether tensor parallel ranks have parts of the layer's inputs; else of its outputs.
        head_dim: of q, k and v, whose outputs are arranged by key and value heads; 0: projections follow each other.
    """

    def __init__(
        self,
        lora: LoRAConfig,
        pairs: Mapping[str, tuple[Tensor, Tensor]],
        config: TransformerConfig,
        *,
        cuts_input: bool,
        head_dim: int = 0,
    ) -> None:
        super().__init__()
        self.lora, self.names, self.cuts_input, self.head_dim = lora, tuple(pairs), cuts_input, head_dim
        self.sequence_parallel = config.sequence_parallel
        for name, (a, b) in pairs.items():
            self.register_parameter(f"{name}_a", nn.Parameter(a))
            self.register_parameter(f"{name}_b", nn.Parameter(b))
        for a, b in self.pairs():
            cut, whole = (a, b) if cuts_input else (b, a)
            tensor_parallel.set_tensor_model_parallel_attributes(cut, True, int(cuts_input), 1)
            # Where each rank has some positions only, Megatron sums the gradient over them.
            setattr(whole, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - torch types no such name

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """A and B of each projection."""
        return [(getattr(self, f"{name}_a"), getattr(self, f"{name}_b")) for name in self.names]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] as the linear layer takes it to [..., out], which is added to what the layer gives."""
        if self.lora.adapter_dropout and self.training:
            own_draws = world.tp_size() > 1 and (self.cuts_input or self.sequence_parallel)
            tracker: Any = tensor_parallel.get_cuda_rng_tracker()
            with tracker.fork() if own_draws else contextlib.nullcontext():
                x = F.dropout(x, self.lora.adapter_dropout)
        pairs = self.pairs()
        low = self._over_ranks(F.linear(x, torch.cat([a for a, _ in pairs])) * self.lora.scale)
        parts = low.split(self.lora.adapter_dim, dim=-1)
        return self._arranged([F.linear(part, b) for part, (_, b) in zip(parts, pairs, strict=True)])

    def _over_ranks(self, low: Tensor) -> Tensor:
        """From the product with A, of which tensor parallel ranks have parts, to what the product with B takes."""
        if world.tp_size() == 1:
            return low
        if self.cuts_input and self.sequence_parallel:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(low)
        if self.cuts_input:
            return tensor_parallel.reduce_from_tensor_model_parallel_region(low)
        if self.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True)
        return tensor_parallel.copy_to_tensor_model_parallel_region(low)

    def _arranged(self, parts: Sequence[Tensor], dim: int = -1) -> Tensor:
        """The projections' outputs along ``dim`` as the layer has them."""
        if not self.head_dim:
            return torch.cat(tuple(parts), dim)
        groups = parts[1].shape[dim] // self.head_dim
        by_group = [part.unflatten(dim, (groups, -1)) for part in parts]
        at = dim if dim < 0 else dim + 1
        return torch.cat(by_group, at).flatten(at - 1, at)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """[out, in]: the layer's weight, or this rank's part of it, with what the adapters add."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        added = self._arranged([b.to(wide) @ a.to(wide) for a, b in self.pairs()], dim=0)
        return (weight.to(wide) + added * self.lora.scale).to(weight.dtype)

    def sharded_state_dict(self, prefix: str, sharded_offsets: tuple[Any, ...]) -> dict[str, Any]:
        """Megatron's sharded tensors."""
        end, axis = ("a", 1) if self.cuts_input else ("b", 0)
        cut = {f"{name}_{end}": axis for name in self.names}
        own = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(own, prefix, cut, sharded_offsets)


@functools.cache
def _adapted(linear: Any) -> type:  # noqa: ANN401 - a class of Megatron's, or ours
    """The class of a linear layer whose output has what its adapters give added."""

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


def adapted_linears(module: nn.Module) -> Iterator[tuple[str, Tensor, Adapters]]:
    """(name, weight, adapters) of each linear layer that has adapters."""
    for name, one in module.named_modules():
        adapters = getattr(one, ADAPTERS, None)
        if isinstance(adapters, Adapters):
            yield name, cast(Tensor, one.weight), adapters


def is_adapted(model: nn.Module) -> bool:
    """True if a model has adapters, and other weights that are not trained."""
    return next(adapted_linears(model), None) is not None


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
        weight.requires_grad_("rm_head" in name.split("."))
    config = cast(TransformerConfig, model.config)
    for layer in [layer for chunk in cast(Any, model).chunks for layer in chunk.decoder.layers]:
        for place in lora.linears:
            linear = layer.get_submodule(place)
            adapters = _made(lora, linear, place, config, seed=f"{seed} {layer.layer_number} {place}")
            setattr(linear, ADAPTERS, adapters)
            linear.__class__ = _adapted(type(linear))


def _made(
    lora: LoRAConfig,
    linear: Any,  # noqa: ANN401 - Megatron's
    place: str,
    config: TransformerConfig,
    *,
    seed: str,
) -> Adapters:
    """The adapters of a linear layer."""
    size, rank = world.tp_size(), world.tp_rank()
    rows, columns = linear.weight.shape
    cuts_input = place in (LINEARS["attention_dense"], LINEARS["mlp_fc2"])
    head_dim, outputs = 0, (rows,)
    if place == LINEARS["attention_qkv"]:
        groups, head_dim = _groups(config, size), config.kv_channels
        assert head_dim is not None
        outputs = (rows - 2 * groups * head_dim, groups * head_dim, groups * head_dim)
    elif place == LINEARS["mlp_fc1"] and config.gated_linear_unit:
        outputs = (rows // 2, rows // 2)
    names = PROJECTIONS[place][-len(outputs) :]
    options = {"dtype": linear.weight.dtype, "device": linear.weight.device}
    width = columns * size if cuts_input else columns
    pairs = {}
    for name, own in zip(names, outputs, strict=True):
        digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        whole = _drawn(lora, width, draw)
        part = whole[:, rank * columns : (rank + 1) * columns] if cuts_input else whole
        pairs[name] = part.to(**options), torch.zeros(own, lora.adapter_dim, **options)
    return Adapters(lora, pairs, config, cuts_input=cuts_input, head_dim=head_dim)


def _groups(config: TransformerConfig, size: int) -> int:
    """This rank's heads of keys."""
    found = config.num_query_groups
    assert found is not None
    if found < size:
        raise UserError(
            f"model.tensor_model_parallel_size={size} cuts the model's {found} heads of keys, and adapters of "
            "attention_qkv need whole ones",
            fix=f"set model.tensor_model_parallel_size={found} or less, or leave attention_qkv out of "
            "model.peft.lora_tuning.target_modules",
        )
    return found // size


def _drawn(lora: LoRAConfig, width: int, draw: torch.Generator) -> Tensor:
    """[r, width] float32, a new A."""
    shape = (lora.adapter_dim, width)
    if lora.column_init_method == "kaiming":
        return (torch.rand(shape, generator=draw) * 2 - 1) / math.sqrt(width)
    return torch.randn(shape, generator=draw) * math.sqrt(2 / (lora.adapter_dim + width))
