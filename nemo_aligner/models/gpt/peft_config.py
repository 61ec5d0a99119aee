# SPDX-License-Identifier: Apache-2.0
"""The settings of adapters. Imports no torch."""

from dataclasses import dataclass, field, fields
from typing import Literal

from nemo_aligner.bounds import bounded, only
from nemo_aligner.errors import UserError
from nemo_aligner.paths import PathText

# The environment variable with the folder in which the jobs of one starter share what they have frozen.
SHARED_FOLDER_VARIABLE = "NEMO_ALIGNER_SHARED_WEIGHTS"

# NeMo's names of the layers that take adapters, and their places in a transformer layer.
LINEARS = {
    "attention_qkv": "self_attention.linear_qkv",
    "attention_dense": "self_attention.linear_proj",
    "mlp_fc1": "mlp.linear_fc1",
    "mlp_fc2": "mlp.linear_fc2",
}
# What Hugging Face's models compute apart, each with an adapter of its own. Without a gate, mlp_fc1 is the last alone.
PROJECTIONS = {
    LINEARS["attention_qkv"]: ("q", "k", "v"),
    LINEARS["attention_dense"]: ("o",),
    LINEARS["mlp_fc1"]: ("gate", "up"),
    LINEARS["mlp_fc2"]: ("down",),
}
_GROUPS = {
    "attention": ("attention_qkv", "attention_dense"),
    "mlp": ("mlp_fc1", "mlp_fc2"),
    "all": tuple(LINEARS),
}


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """The ``model.peft.lora_tuning`` block."""

    # attention_qkv, attention_dense, mlp_fc1, mlp_fc2, or a group of these: attention, mlp, all
    target_modules: tuple[str, ...] = ("attention_qkv",)
    adapter_dim: int = bounded(32, at_least=1)  # the rank r
    # the product of both matrices is multiplied with alpha / r; null: r
    alpha: float | None = bounded(None, above=0, to="more than 0, or null")
    # dropout of the adapters' input
    adapter_dropout: float = bounded(0.0, at_least=0, below=1, to="0 or more, and below 1")
    # how the matrix next to the input is drawn: xavier (normal), or kaiming (uniform, as PEFT does)
    column_init_method: Literal["xavier", "kaiming"] = "xavier"
    row_init_method: str = only("zero", what="an adapter that changes the model before training")  # only zero
    layer_selection: tuple[int, ...] | None = only(None, what="adapters in some layers alone")  # only null
    weight_tying: bool = only(False, what="one adapter for all layers")  # only False
    position_embedding_strategy: str | None = only(None, what="it goes with tied adapters and")  # only null

    @property
    def linears(self) -> tuple[str, ...]:
        """The places of the layers that get adapters."""
        return tuple(place for name, place in LINEARS.items() if name in self._names)

    @property
    def _names(self) -> list[str]:
        return [one for name in self.target_modules for one in _GROUPS.get(name, (name,))]

    def check(self) -> None:
        """Raise UserError for layers that are not known, or none.

        Raises:
            UserError: with the setting.
        """
        names, unknown = self._names, [name for name in self._names if name not in LINEARS]
        if unknown or not names:
            key, known = "model.peft.lora_tuning.target_modules", ", ".join((*LINEARS, *_GROUPS))
            raise UserError(
                f"{key}: {unknown[0]} is not known" if unknown else f"{key} is empty",
                fix=f"give a list of {known}",
            )

    @property
    def scale(self) -> float:
        """The factor of the product of both matrices."""
        return self.numerator / self.adapter_dim

    @property
    def numerator(self) -> float:
        """Alpha, or the rank where it is not given."""
        return self.alpha or self.adapter_dim


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The ``model.peft`` block."""

    # lora: low-rank adapters (Hu et al. 2021) are trained, and the model is as it was; qlora: its weights are in four
    # bits (Dettmers et al. 2023); none: all weights are trained
    peft_scheme: Literal["none", "lora", "qlora"] | None = "none"
    # adapters to begin with, a folder as PEFT writes it; null: new ones
    restore_from_path: PathText | None = None
    lora_tuning: LoRAConfig = field(default_factory=LoRAConfig)  # the adapters

    def check(self) -> None:
        """Raise UserError for unknown layers, and for settings of adapters where none are trained.

        Raises:
            UserError: with the setting.
        """
        if self.lora is not None:
            self.lora.check()
        elif self.restore_from_path:
            raise UserError(
                f"model.peft.restore_from_path={self.restore_from_path} names adapters, and "
                f"model.peft.peft_scheme={self.peft_scheme or 'null'}",
                fix="set model.peft.peft_scheme=lora",
            )
        elif changed := [
            spec.name
            for spec in fields(LoRAConfig)
            if getattr(self.lora_tuning, spec.name) != getattr(LoRAConfig(), spec.name)
        ]:
            key = f"model.peft.lora_tuning.{changed[0]}"
            raise UserError(
                f"{key}={getattr(self.lora_tuning, changed[0])} is of adapters, and with "
                f"model.peft.peft_scheme={self.peft_scheme or 'null'} all weights are trained",
                fix=f"set model.peft.peft_scheme=lora, or leave {key} out",
            )

    @property
    def lora(self) -> LoRAConfig | None:
        """The adapters; None where all weights are trained."""
        return self.lora_tuning if self.peft_scheme in ("lora", "qlora") else None

    @property
    def quantizes(self) -> bool:
        """True if the weights that are not trained are in four bits."""
        return self.peft_scheme == "qlora"
