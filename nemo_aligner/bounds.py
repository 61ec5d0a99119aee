# SPDX-License-Identifier: Apache-2.0
"""A setting's range or choices, said once beside its default, and the walker that refuses others. Knows no setting."""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

from nemo_aligner.errors import UserError

T = TypeVar("T")

# A message's problem and its fix; {key}, {value} and {range} are the setting's, other names its block's.
_OUT_OF_RANGE = ("{key}={value} is out of range", "set {key} to {range}")
_BOUNDS = "bounds"


@dataclass(frozen=True, kw_only=True)
class _Bounds:
    at_least: float | None
    above: float | None
    at_most: float | None
    below: float | None
    range: str
    message: tuple[str, str]

    def hold(self, value: Any) -> bool:  # noqa: ANN401 - a number
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


@dataclass(frozen=True, kw_only=True)
class _Choice:
    values: tuple[object, ...]
    range: str
    message: tuple[str, str]

    def hold(self, value: object) -> bool:
        # True is 1, and no number is meant by it.
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.values)


def bounded(
    default: T,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    to: str = "",
    message: tuple[str, str] = _OUT_OF_RANGE,
) -> T:
    """Give a field of a settings dataclass its default and its range. None is in every range.

    Args:
        to: the range in words, where "N or more", "N to M" or "more than N" does not say it all.
        message: the problem and the fix.
    """
    least = f"{at_least} or more" if at_most is None else f"{at_least} to {at_most}"
    bounds = _Bounds(
        at_least=at_least,
        above=above,
        at_most=at_most,
        below=below,
        range=to or (least if above is None else f"more than {above}"),
        message=message,
    )
    return field(default=default, metadata={_BOUNDS: bounds})


def one_of(*values: T, message: tuple[str, str] = ("{key}={value!r} is not known", "use {range}")) -> T:
    """Give a field its default, the first of ``values``, and all that it may be."""
    *first, last = ("null" if value is None else str(value) for value in values)
    named = f"{', '.join(first)} or {last}" if first else last
    return field(default=values[0], metadata={_BOUNDS: _Choice(values=values, range=named, message=message)})


def only(value: T, *same: object, what: str = "") -> T:
    """Give a field the one value that is supported; ``same`` means the same, ``what`` is what other values ask for."""
    named = "null" if value is None else str(value)
    message = (f"{{key}}={{value}}{what and f': {what}'} is not supported", "set {key}={range}")
    choice = _Choice(values=(value, *same), range=named, message=message)
    return field(default=value, metadata={_BOUNDS: choice})


def _bounds(kind: type[Any], name: str) -> _Bounds | _Choice | None:
    """Those of the field; a subclass that gives another default keeps them."""
    specs = (base.__dict__.get("__dataclass_fields__", {}).get(name) for base in kind.__mro__)
    return next((spec.metadata[_BOUNDS] for spec in specs if spec and _BOUNDS in spec.metadata), None)


def check_bounds(settings: object, block: str = "") -> None:
    """Raise UserError for values outside their range, those of inner blocks too.

    Args:
        settings: a dataclass whose fields may be :func:`bounded`.
        block: where these settings stand, as in "trainer.ppo"; empty: at the top.

    Raises:
        UserError: naming the setting, its value and the range.
    """
    assert is_dataclass(settings)
    for spec in fields(settings):
        key = f"{block}.{spec.name}" if block else spec.name
        value = getattr(settings, spec.name)
        if is_dataclass(value):
            check_bounds(value, key)
        bounds = _bounds(type(settings), spec.name)
        if bounds is None or (value is None and isinstance(bounds, _Bounds)):
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if not bounds.hold(number):
                words = vars(settings) | {"key": key, "value": number, "range": bounds.range}
                problem, fix = (text.format_map(words) for text in bounds.message)
                raise UserError(problem, fix=fix)
