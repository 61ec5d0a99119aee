# SPDX-License-Identifier: Apache-2.0
"""How Megatron's linear layers hold Hugging Face's projections: q, k and v in one, gate and up in another."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.peft_config import LINEARS, PROJECTIONS
from nemo_aligner.parallel import world


@dataclass(frozen=True, kw_only=True)
class Projections:
    """Those of a linear layer, in the order in which its outputs hold them."""

    names: tuple[str, ...]  # of PROJECTIONS
    rows: tuple[int, ...]  # this rank's outputs of each
    # of q, k and v, whose outputs are arranged by heads of keys; 0: projections follow each other
    head_dim: int
    cuts_input: bool  # whether tensor parallel ranks have parts of the layer's inputs; else of its outputs

    @classmethod
    def of(cls, outputs: int, place: str, config: TransformerConfig) -> "Projections":
        """Those of the layer at ``place``, one of LINEARS, that has so many ``outputs`` on this rank.

        Raises:
            UserError: the layout cuts heads of keys.
        """
        cuts_input = place in (LINEARS["attention_dense"], LINEARS["mlp_fc2"])
        head_dim, parts = 0, (outputs,)
        if place == LINEARS["attention_qkv"]:
            head_dim = config.kv_channels or 0
            key = _key_heads_here(config) * head_dim
            parts = (outputs - 2 * key, key, key)
        elif place == LINEARS["mlp_fc1"] and config.gated_linear_unit:
            parts = (outputs // 2, outputs // 2)
        names = PROJECTIONS[place][-len(parts) :]
        return cls(names=names, rows=parts, head_dim=head_dim, cuts_input=cuts_input)

    def arranged(self, parts: Sequence[Tensor], dim: int = -1) -> Tensor:
        """Concatenate the projections along ``dim`` as the layer does: q, k, v by group, else one after another."""
        if not self.head_dim:
            return torch.cat(tuple(parts), dim)
        by_group = [part.unflatten(dim, (self._groups, -1)) for part in parts]
        at = dim if dim < 0 else dim + 1
        return torch.cat(by_group, at).flatten(at - 1, at)

    def split(self, rows: Tensor) -> list[Tensor]:
        """The opposite of :meth:`arranged` along the first axis: [out, ...] to each projection's [rows, ...]."""
        if not self.head_dim:
            return list(rows.split(self.rows))
        by_group = rows.unflatten(0, (self._groups, -1))
        return [part.flatten(0, 1) for part in by_group.split([n // self._groups for n in self.rows], dim=1)]

    @property
    def _groups(self) -> int:
        return self.rows[1] // self.head_dim


def _key_heads_here(config: TransformerConfig) -> int:
    """This rank's heads of keys."""
    found, size = config.num_query_groups, world.tp_size()
    assert found is not None
    if found < size:
        raise UserError(
            f"model.tensor_model_parallel_size={size} cuts the model's {found} heads of keys, and adapters and NF4 "
            "need whole ones",
            fix=f"set model.tensor_model_parallel_size={found} or less; or, with peft_scheme=lora, leave attention_qkv "
            "out of model.peft.lora_tuning.target_modules",
        )
    return found // size
