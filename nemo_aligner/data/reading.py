# SPDX-License-Identifier: Apache-2.0
"""The tokenisation of a reward model's texts, as its checkpoint has it. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_aligner.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The tokens around a text's own."""

    append_eod: bool = False  # EOS at its end, where the reward is then read
    add_bos: bool | None = None  # BOS at its start; None: as the tokenizer does

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Reading | None":
        """The settings in the ``data`` block of a model_config.yaml, as NeMo has them; None if there are none.

        Raises:
            UserError: a value is neither true nor false.
        """
        block = config.get("data")
        if not isinstance(block, Mapping) or "append_eod" not in block:
            return None
        found = {name: block.get(name) for name in ("append_eod", "add_bos")}
        for name, value in found.items():
            if not isinstance(value, bool) and not (value is None and name == "add_bos"):
                raise UserError(
                    f"data.{name}={value!r} in model_config.yaml is neither true nor false",
                    fix=f"set it to what model.data.{name} was in the reward model's training",
                )
        return cls(**found)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"append_eod={self.append_eod}, add_bos={'null' if self.add_bos is None else self.add_bos}"
