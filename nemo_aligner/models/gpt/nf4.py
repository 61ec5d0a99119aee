# SPDX-License-Identifier: Apache-2.0
"""Weights in four bits: NF4 with double quantization (Dettmers 2023, arXiv 2305.14314), the values of bitsandbytes.

A weight's numbers are, in blocks of 64 along its rows, one of 16 levels times the block's largest size. The sizes are
stored in eight bits, less their mean, in blocks of 256. So a weight takes 0.52 bytes.
"""

import functools
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.peft_config import LINEARS
from nemo_aligner.models.gpt.projections import Projections
from nemo_aligner.parallel import collectives, world
from nemo_aligner.parallel.cpu_speed import product

BLOCK, SIZES_BLOCK = 64, 256
# The paper's appendix E: quantiles of a normal distribution, of which 0 is one.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@functools.cache
def size_levels(device: torch.device) -> Tensor:
    """[256] float32, ascending: bitsandbytes' levels of a size, seven decades of either sign (arXiv 2110.02861)."""
    found = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = ((edges[:-1] + edges[1:]) / 2) * 10.0 ** (decade - 6)
        found += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(found), dtype=torch.float32, device=device)


@functools.cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(LEVELS, device=device)


@functools.cache
def _byte_levels(device: torch.device) -> Tensor:
    """[256, 2] float32: the two levels of each byte of codes."""
    return torch.cartesian_prod(_levels(device), _levels(device))


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Return uint8, the number of the level that is nearest to each of ``x``."""
    return torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


def quantized(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes of a whole weight [out, in], in being a multiple of 64.

    Returns:
        [out, in / 2] uint8, two levels each, the first in the higher bits; [out, in / 64] uint8, levels of sizes; and
        [n, 2] float32, the factor and the summand of each 256 sizes in their order.
    """
    blocks = weight.float().unflatten(1, (-1, BLOCK))
    sizes = blocks.abs().amax(-1)
    codes = nearest(
        blocks / sizes.clamp(min=torch.finfo(torch.float32).tiny)[..., None], _levels(weight.device)
    ).flatten(1)
    mean = sizes.mean()
    flat = torch.nn.functional.pad(sizes.flatten() - mean, (0, -sizes.numel() % SIZES_BLOCK)).view(
        -1, SIZES_BLOCK
    )
    factor = flat.abs().amax(1)
    scaled = flat / factor.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    size_codes = nearest(scaled, size_levels(weight.device)).flatten()[: sizes.numel()].view(sizes.shape)
    return (
        codes[:, ::2] << 4 | codes[:, 1::2],
        size_codes,
        torch.stack((factor, mean.expand(factor.shape)), 1),
    )


class NF4(nn.Module):
    """This rank's part of a linear layer's weight, each of whose projections is quantized as a whole.

    So a weight has the same values at every layout, and those that bitsandbytes gives Hugging Face's layers.

    Args:
        weight: [out, in] of this rank. Called by every tensor parallel rank.
        place: the layer's, for messages.

    Raises:
        UserError: a block of 64 numbers would not lie within this rank's part of a row.
    """

    codes: Tensor  # [out, in / 2] uint8
    sizes: Tensor  # [out, in / 64] uint8
    firsts: Tensor  # [out] int32: the number of each row's first block, over all projections
    table: Tensor  # [n, 2] float32: of each 256 blocks

    def __init__(self, weight: Tensor, projections: Projections, *, place: str) -> None:
        super().__init__()
        self.dtype, self.cuts_input, (_, columns) = weight.dtype, projections.cuts_input, weight.shape
        if columns % BLOCK:
            raise UserError(
                f"{place} has rows of {columns} numbers on each rank, and NF4 takes {BLOCK} at a time",
                fix="set model.peft.peft_scheme=lora, or a lower model.tensor_model_parallel_size, where it is above 1",
            )
        found = [self._part(part, cuts_input=projections.cuts_input) for part in projections.split(weight)]
        codes, sizes, firsts, tables = zip(*found, strict=True)
        counts = torch.tensor([0, *(len(table) for table in tables)]).cumsum(0)
        firsts = [first + int(before) * SIZES_BLOCK for first, before in zip(firsts, counts, strict=False)]
        for name, parts in (("codes", codes), ("sizes", sizes), ("firsts", firsts)):
            self.register_buffer(name, projections.arranged(parts, dim=0), persistent=False)
        self.register_buffer("table", torch.cat(tables), persistent=False)

    def _part(self, part: Tensor, *, cuts_input: bool) -> tuple[Tensor, ...]:
        """Codes, levels of sizes and, in the whole projection's order, the number of each row's first block."""
        whole = _gathered(part, dim=int(cuts_input))
        codes, sizes, table = quantized(whole)
        rows, blocks = part.shape[0], part.shape[1] // BLOCK
        row, block = (0, world.tp_rank() * blocks) if cuts_input else (world.tp_rank() * rows, 0)
        own = slice(row, row + rows)
        halves = BLOCK // 2
        firsts = torch.arange(row, row + rows, device=part.device) * sizes.shape[1] + block
        return (
            codes[own, block * halves : (block + blocks) * halves],
            sizes[own, block : block + blocks],
            firsts.int(),
            table,
        )

    def weight(self) -> Tensor:
        """[out, in] in the model's dtype."""
        codes, sizes, firsts, table = self.codes, self.sizes, self.firsts, self.table
        which = (firsts[:, None] + torch.arange(sizes.shape[1], device=codes.device)) // SIZES_BLOCK
        scale = size_levels(codes.device)[sizes.int()] * table[which, 0] + table[which, 1]
        numbers = _byte_levels(codes.device)[codes.int()].view(*sizes.shape, BLOCK)
        return (numbers * scale[..., None]).flatten(1).to(self.dtype)


def _gathered(part: Tensor, *, dim: int) -> Tensor:
    """The whole of which tensor parallel ranks have parts along ``dim``."""
    turned = part if dim else part.t()
    whole = collectives.gather_over_tensor_parallel(turned.contiguous())
    return whole if dim else whole.t()


class _FrozenProduct(torch.autograd.Function):
    """x @ weight.T of a weight that is made again for the backward, and kept nowhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, packed: NF4, sums: bool) -> Tensor:  # noqa: ANN401
        ctx.packed, ctx.sums = packed, sums
        return product(x.flatten(0, -2), weight).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        weight = ctx.packed.weight()
        grad_x = product(grad.flatten(0, -2), weight.t()).view(*grad.shape[:-1], weight.shape[1])
        return (collectives.sum_over_tensor_parallel(grad_x) if ctx.sums else grad_x), None, None, None


@functools.cache
def _packed(linear: Any) -> type:  # noqa: ANN401 - a class of Megatron's, or ours
    """The class of a linear layer whose weight is an NF4."""

    def weight(self: Any) -> Tensor:  # noqa: ANN401
        return self.nf4.weight()

    def forward(self: Any, x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401
        # Megatron's asks for the weight twice where it is not handed it.
        return linear.forward(self, x, self.nf4.weight(), *args, **options)

    def forward_impl(self: Any, input: Tensor, weight: Tensor, **options: Any) -> Tensor:  # noqa: ANN401
        if options["sequence_parallel"]:
            input = tensor_parallel.gather_from_sequence_parallel_region(
                input, tensor_parallel_output_grad=True
            )
        out = _FrozenProduct.apply(input, weight, self.nf4, options["allreduce_dgrad"])
        return out if options["bias"] is None else out + options["bias"]

    def sharded_state_dict(
        self: Any,  # noqa: ANN401 - Megatron's
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        own = linear.sharded_state_dict(self, prefix, sharded_offsets, metadata)
        packed: NF4 = self.nf4
        # A placeholder of the right shape: whole_state puts the weight in its place.
        shape = len(packed.codes), 2 * packed.codes.shape[1]
        weight = {"weight": torch.empty(shape, dtype=packed.dtype, device="meta")}
        cut = {"weight": int(packed.cuts_input)}
        return own | make_sharded_tensors_for_checkpoint(weight, prefix, cut, sharded_offsets)

    members = {
        "weight": property(weight),
        "_forward_impl": forward_impl,
        "sharded_state_dict": sharded_state_dict,
    }
    if issubclass(linear, ColumnParallelLinear):
        members["forward"] = forward
    return type(linear.__name__, (linear,), members)


@torch.no_grad()
def quantize(model: Any) -> None:  # noqa: ANN401 - a GPT, or the parts of one
    """Replace the weights of all linear layers but the head by their NF4. Called by every rank.

    Raises:
        UserError: the layout cuts heads of keys, or blocks of 64 numbers.
    """
    for layer in [layer for chunk in model.chunks for layer in chunk.decoder.layers]:
        for place in LINEARS.values():
            linear = layer.get_submodule(place)
            weight = linear.weight.detach()
            packed = NF4(weight, Projections.of(weight.shape[0], place, model.config), place=place)
            del linear.weight
            linear.nf4 = packed
            linear.__class__ = _packed(type(linear))
