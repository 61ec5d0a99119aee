# SPDX-License-Identifier: Apache-2.0
"""The settings of objectives. Imports no torch, so that they are checked before it is loaded."""

from dataclasses import dataclass
from typing import Literal

from nemo_aligner.errors import UserError

__all__ = ["PairLoss", "RegressionConfig"]

PairLoss = Literal["regression", "regular_bt", "margin_bt", "scaled_bt"]


@dataclass(frozen=True, kw_only=True)
class RegressionConfig:
    """The ``model.regression`` block."""

    num_attributes: int = 1  # numbers that the head gives to a sequence
    merge_attributes: bool = False  # serve one reward: the attributes weighted by attribute_weights
    attribute_weights: tuple[float, ...] | None = None  # null: each 1 / num_attributes
    loss_mask_val: float = -100.0  # the label of an attribute that was not judged
    loss_func: PairLoss = "regression"
    load_rm_head_weights: bool = False  # start from the head of the checkpoint, where it is a reward model

    def check(self) -> None:
        """Refuse sizes that do not fit each other.

        Raises:
            UserError: with the setting.
        """
        if self.num_attributes < 1:
            raise UserError(
                f"model.regression.num_attributes={self.num_attributes} is not positive",
                cure="set it to 1 or more",
            )
        if self.attribute_weights is not None and len(self.attribute_weights) != self.num_attributes:
            raise UserError(
                f"model.regression.attribute_weights has {len(self.attribute_weights)} numbers, and "
                f"model.regression.num_attributes={self.num_attributes}",
                cure="give one weight for each attribute",
            )

    @property
    def weights(self) -> list[float]:
        """What merges the attributes into one reward, in their order."""
        return list(self.attribute_weights or [1 / self.num_attributes] * self.num_attributes)
