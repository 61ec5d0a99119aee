# SPDX-License-Identifier: Apache-2.0
"""A check of a file's values by the types of the architecture's fields. Knows types and bounds; knows no meaning."""

import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeGuard

from nemo_aligner.errors import UserError

_LARGEST = 2**31 - 1
_MOST_LAYERS = 10_000
_MAY_BE_0 = frozenset({"num_query_groups", "kv_channels"})  # as null: derived
_LONGEST_SHOWN = 60  # characters of a value in a message


def is_size(value: object, *, at_least: int = 1, at_most: int = _LARGEST) -> bool:
    """True if a value is a whole number within bounds."""
    return isinstance(value, int) and not isinstance(value, bool) and at_least <= value <= at_most


def is_number(value: object) -> TypeGuard[int | float]:
    """True if a value is a finite number."""
    # An int may be too large for a float.
    return (isinstance(value, float) and math.isfinite(value)) or is_size(
        value, at_least=-(2**63), at_most=2**63
    )


def check_types(
    values: Mapping[str, Any], kind: type, *, where: str, names: Mapping[str, str] | None = None
) -> None:
    """Raise UserError for values of other types than ``kind``'s fields; keys without a field are skipped.

    Args:
        values: as a file holds them.
        kind: a dataclass; its whole numbers are sizes.
        where: names the file in messages.
        names: what the file calls a field, where that is another name.

    Raises:
        UserError: naming file, key and value.
    """
    hints = typing.get_type_hints(kind)
    for name in values.keys() & hints.keys():
        value, wanted = values[name], _wanted(name, values[name], hints[name])
        if wanted is not None:
            shown = repr(value)
            shown = shown if len(shown) <= _LONGEST_SHOWN else shown[:_LONGEST_SHOWN] + " ..."
            key = (names or {}).get(name, name)
            raise UserError(f"{where}: {key}={shown} is not {wanted}", fix=f"correct {key} there")


def _wanted(name: str, value: object, hint: Any) -> str | None:  # noqa: ANN401 - a type
    """The expected type of a value; None if the value has it."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None:
        return None if type(None) in options else "given"
    if bool in options:
        return None if isinstance(value, bool) else "true or false"
    if int in options and str not in options:
        least, most = int(name not in _MAY_BE_0), _MOST_LAYERS if name == "num_layers" else _LARGEST
        return (
            None if is_size(value, at_least=least, at_most=most) else f"a whole number from {least} to {most}"
        )
    if float in options:
        return None if is_number(value) else "a finite number"
    if str in options or typing.get_origin(options[0]) is typing.Literal:
        return None if isinstance(value, str | int) else "text"
    return None
