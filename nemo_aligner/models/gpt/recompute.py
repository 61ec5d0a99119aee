# SPDX-License-Identifier: Apache-2.0
"""Which activations the backward computes again instead of keeping them. Pure; imports neither torch nor Megatron."""

from dataclasses import dataclass
from typing import Literal

from nemo_aligner.errors import UserError

Granularity = Literal["selective", "full"]
Method = Literal["uniform", "block"]

_KEY = "model.activations_checkpoint"


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """NeMo's ``activations_checkpoint_*`` keys."""

    # selective: attention's products; full: whole layers; None: nothing
    granularity: Granularity | None = None
    method: Method | None = None  # of full: uniform groups of layers, or a block of the first ones
    num_layers: int | None = None  # uniform: layers of a group; block: layers of a chunk that are recomputed

    def check(self) -> None:
        """Raise UserError for what Megatron would assert on.

        Raises:
            UserError: with the setting that is missing or too much.
        """
        if self.granularity == "full":
            if self.method is None:
                raise UserError(
                    f"{_KEY}_granularity=full needs {_KEY}_method",
                    fix=f"set {_KEY}_method=uniform (all layers, in groups) or block (some of them)",
                )
            if self.num_layers is None or self.num_layers < 1:
                raise UserError(
                    f"{_KEY}_granularity=full needs {_KEY}_num_layers, which is {_named(self.num_layers)}",
                    fix=f"set {_KEY}_num_layers=1 (with uniform: layers of a group; with block: layers recomputed)",
                )
        elif self.num_layers is not None:
            raise UserError(
                f"{_KEY}_num_layers={self.num_layers} is for whole layers, but {_KEY}_granularity="
                f"{_named(self.granularity)}",
                fix=f"set {_KEY}_num_layers=null, or {_KEY}_granularity=full",
            )

    def check_layers(self, layers: int) -> None:
        """Raise UserError if groups do not divide the ``layers`` of a chunk of the model.

        Raises:
            UserError: with the sizes that do.
        """
        if self.granularity != "full" or self.method != "uniform" or self.num_layers is None:
            return
        if layers % self.num_layers:
            fits = [n for n in range(1, layers + 1) if layers % n == 0]
            raise UserError(
                f"{_KEY}_num_layers={self.num_layers} does not divide the {layers} layers of a pipeline stage",
                fix=f"set {_KEY}_num_layers to one of {fits}",
            )


def _named(value: object) -> str:
    return "null" if value is None else str(value)
