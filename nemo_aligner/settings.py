# SPDX-License-Identifier: Apache-2.0
"""From Hydra's config to typed, frozen settings. A key that nobody knows is an error with the nearest known one.

Knows dataclasses, the architecture's keys and the keys that change nothing; knows no script's settings.
"""

import builtins
import collections.abc
import dataclasses
import difflib
import logging
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_aligner.compatibility import ACCEPTED, NO_EFFECT, RENAMED
from nemo_aligner.errors import UserError
from nemo_aligner.models.gpt.config import ARCHITECTURE_KEYS, GPTConfig
from nemo_aligner.paths import PathText, expand_home

logger = logging.getLogger(__name__)

T = TypeVar("T")

NEAR = 0.75  # likeness, from 0 to 1, of a mistyped name and the one that was meant
MOST_SUGGESTED = 3
# What stands for no value where a setting must have one, by its type; what is not there at all stands for all.
_NOT_GIVEN = {str: (dataclasses.MISSING, None)}


def log_no_effect(config: DictConfig, kind: type[object]) -> None:
    """One line for each setting of ``config``, as Hydra composed it, that asks for an effect it does not have.

    Args:
        kind: the script's settings; what is a field of theirs has an effect.
    """
    for key, idle, instead in NO_EFFECT:
        parent, _, name = key.rpartition(".")
        if is_field(kind, key):
            continue
        block = OmegaConf.select(config, parent)
        # An interpolation only repeats another setting.
        if block is None or name not in block or OmegaConf.is_interpolation(block, name):
            continue
        value = OmegaConf.select(config, key)
        if value not in (None, *idle):
            logger.info("%s=%s has no effect: %s", key, value, instead)


def is_field(kind: Any, key: str) -> bool:  # noqa: ANN401
    """True if a dotted key names a field in nested dataclasses."""
    name, _, rest = key.partition(".")
    if not dataclasses.is_dataclass(kind) or name not in {f.name for f in dataclasses.fields(kind)}:
        return False
    hint = typing.get_type_hints(kind)[name]
    if typing.get_origin(hint) is collections.abc.Mapping:
        rest = rest.partition(".")[2]  # without the user's name
    return not rest or is_field(_block(hint), rest)


def parse(config: DictConfig, kind: type[T]) -> T:
    """``config`` as a ``kind``.

    Raises:
        UserError: keys are unknown (with the nearest known ones), one is missing, or has a value of the wrong type.
    """
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        line = str(error).splitlines()[0]
        raise UserError(
            f"the configuration does not resolve: {line}", fix="correct the key it names"
        ) from error
    assert isinstance(values, dict)
    values = {str(k): v for k, v in values.items() if k != "hydra"}
    model = values.get("model")
    if isinstance(model, dict):
        # null leaves the checkpoint's own value in place.
        hints = typing.get_type_hints(GPTConfig)
        given = {k: v for k, v in model.items() if k in ARCHITECTURE_KEYS and v is not None}
        for key in given.keys() & hints.keys():
            converted = _convert(given[key], hints[key], f"model.{key}")
            # A block is checked and stays as model_config.yaml has it.
            given[key] = given[key] if dataclasses.is_dataclass(converted) else converted
        values["model"] = {k: v for k, v in model.items() if k not in ARCHITECTURE_KEYS} | {
            "architecture": given
        }
    refuse_unknown(values, kind)
    return _build(values, kind, "")


def refuse_unknown(values: Mapping[str, Any], kind: type[object]) -> None:
    """Raise UserError if ``values`` hold unknown keys, with all of them."""
    unknown = list(_unknown(values, kind, ""))
    if not unknown:
        return
    everywhere = list(all_keys(kind))
    suggestions = [_suggestion(key, known, everywhere) for key, known in unknown]
    if len(unknown) == 1:
        raise UserError(f"unknown key {unknown[0][0]}", fix=suggestions[0])
    raise UserError(
        "unknown keys " + ", ".join(key for key, _ in unknown),
        fix="\n".join(f"{key}: {text}" for (key, _), text in zip(unknown, suggestions, strict=True)),
    )


def _unknown(
    values: Mapping[str, Any], kind: type[object] | None, path: str
) -> Iterator[tuple[str, list[str]]]:
    """(unknown key, the keys that are known in its place) of a block and those below it; kind None knows none."""
    of_kind = typing.get_type_hints(kind) if kind else {}
    # Not every hint is a setting: class variables have one too.
    hints = {spec.name: of_kind[spec.name] for spec in dataclasses.fields(kind)} if kind else {}  # type: ignore[arg-type]
    known = [*hints, *(ARCHITECTURE_KEYS if path == "model." else ())]
    for name, value in values.items():
        key = f"{path}{name}"
        block = _block(hints[name]) if name in hints else None
        if block and isinstance(value, dict):
            for inner, path_of_block in _blocks(value, hints[name], key):
                yield from _unknown(inner, block, path_of_block)
        elif name in known or key in ACCEPTED:
            continue
        elif isinstance(value, dict) and any(other.startswith(f"{key}.") for other in ACCEPTED):
            yield from _unknown(value, None, f"{key}.")
        else:
            yield key, known


def all_keys(kind: type[object], path: str = "") -> Iterator[str]:
    """All dotted keys of nested dataclasses; * stands for a name of the user's."""
    if path == "model.":
        yield from (f"{path}{name}" for name in ARCHITECTURE_KEYS)
    hints = typing.get_type_hints(kind)
    for spec in dataclasses.fields(kind):  # type: ignore[arg-type]
        if block := _block(hints[spec.name]):
            named = typing.get_origin(hints[spec.name]) is collections.abc.Mapping
            yield from all_keys(block, f"{path}{spec.name}.{'*.' if named else ''}")
        else:
            yield f"{path}{spec.name}"


def _refuse_missing(values: Mapping[str, Any], kind: type[object], path: str) -> None:
    """Raise UserError if settings without a default are not set, with all of them, those of inner blocks too."""
    missing = list(_missing(values, kind, path))
    if not missing:
        return
    *others, last = missing
    raise UserError(
        f"{', '.join(others)} and {last} are not set" if others else f"{last} is not set",
        fix=f"add {' '.join(f'{key}=...' for key in missing)} to the command line",
    )


def _missing(values: Mapping[str, Any], kind: type[object], path: str) -> Iterator[str]:
    hints = typing.get_type_hints(kind)
    for spec in dataclasses.fields(kind):  # type: ignore[arg-type]
        key, value = f"{path}{spec.name}", values.get(spec.name, dataclasses.MISSING)
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        block = _block(hints[spec.name])
        if block and isinstance(value, dict):
            for inner, path_of_block in _blocks(value, hints[spec.name], key):
                yield from _missing(inner, block, path_of_block)
        elif block and (required or value is None) and not _may_be_absent(hints[spec.name]):
            yield from _missing({}, block, f"{key}.")
        elif value == "???" or (
            required and value in _NOT_GIVEN.get(hints[spec.name], (dataclasses.MISSING,))
        ):
            yield key


def _block(hint: Any) -> type[object] | None:  # noqa: ANN401
    """The dataclass of a hint, None beside it or not."""
    kinds = (hint, *typing.get_args(hint))
    return next((kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)


def _blocks(value: dict[str, Any], hint: Any, key: str) -> Iterator[tuple[dict[str, Any], str]]:  # noqa: ANN401
    """(values, dotted prefix) of the block under ``key``, or of each block where names of the user's stand between."""
    if typing.get_origin(hint) is not collections.abc.Mapping:
        yield value, f"{key}."
        return
    yield from ((inner, f"{key}.{name}.") for name, inner in value.items() if isinstance(inner, dict))


def _may_be_absent(hint: Any) -> bool:  # noqa: ANN401
    return type(None) in typing.get_args(hint) or typing.get_origin(hint) is collections.abc.Mapping


def _suggestion(key: str, known: list[str], everywhere: Sequence[str]) -> str:
    """The fix for an unknown key.

    Args:
        key: dotted.
        known: names that are known in its block.
        everywhere: all dotted keys.
    """
    if key in RENAMED:
        return f"use {RENAMED[key]}, its name here"
    prefix, dot, name = key.rpartition(".")
    prefix += dot
    by_name: dict[str, list[str]] = {}
    for other in everywhere:
        by_name.setdefault(other.rpartition(".")[2], []).append(other)
    here = difflib.get_close_matches(name, known, n=1, cutoff=NEAR)
    if here and name not in by_name:
        return f"did you mean {prefix}{here[0]}?"
    if near := difflib.get_close_matches(name, by_name, n=1, cutoff=NEAR):
        return f"did you mean {' or '.join(by_name[near[0]][:MOST_SUGGESTED])}?"
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.5):
        return f"did you mean {prefix}{near[0]}?"
    return f"known keys: {', '.join(prefix + k for k in sorted(known))}" if known else "leave it out"


def _build(values: Mapping[str, Any], kind: type[T], path: str, default: T | None = None) -> T:
    """A ``kind`` of the values, and of ``default``'s where there are none."""
    _refuse_missing(values, kind, path)
    hints = typing.get_type_hints(kind, include_extras=True)
    given: dict[str, Any] = {}
    for spec in dataclasses.fields(kind):  # type: ignore[arg-type]
        if (name := spec.name) in values:
            made = None if spec.default_factory is dataclasses.MISSING else spec.default_factory()
            given[name] = _convert(values[name], hints[name], f"{path}{name}", getattr(default, name, made))
    return kind(**given) if default is None else dataclasses.replace(default, **given)  # type: ignore[type-var]


def _convert(value: Any, hint: Any, key: str, default: Any = None) -> Any:  # noqa: ANN401 - values of a YAML file
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if value is None:
            value = {}  # as NeMo's scripts leave a block out
        if not isinstance(value, dict):
            raise UserError(
                f"{key}={value!r} is not a block of keys", fix=f"set keys below it, as in {key}.NAME=..."
            )
        return _build(value, hint, f"{key}.", default)
    args = typing.get_args(hint)
    match typing.get_origin(hint):
        case typing.Union | types.UnionType:
            return _convert_union(value, args, key, default)
        case typing.Literal:
            if value in args:
                return value
            raise UserError(f"{key}={value!r} is not known", fix=f"use one of {', '.join(map(str, args))}")
    return _convert_several(value, hint, key)


def _convert_several(value: Any, hint: Any, key: str) -> Any:  # noqa: ANN401
    args = typing.get_args(hint)
    match typing.get_origin(hint):
        case builtins.tuple if isinstance(value, list) and args[1:] == (...,):
            return tuple(_convert(v, args[0], f"{key}[{i}]") for i, v in enumerate(value))
        case builtins.tuple if isinstance(value, list) and len(value) == len(args):
            return tuple(
                _convert(v, a, f"{key}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True))
            )
        case builtins.tuple if not isinstance(value, list | dict) and value is not None:
            raise UserError(f"{key}={value} is one value and no list", fix=f"set {key}=[{value}]")
        case builtins.dict if isinstance(value, dict):
            return value
        case collections.abc.Mapping if isinstance(value, dict):
            return {str(name): _convert(inner, args[1], f"{key}.{name}") for name, inner in value.items()}
    return _convert_plain(value, hint, key)


def _convert_union(value: Any, options: tuple[Any, ...], key: str, default: Any) -> Any:  # noqa: ANN401
    if value is None and type(None) in options:
        return None
    kinds = [option for option in options if option is not type(None)]
    if any(_is_exactly(value, kind) for kind in kinds):
        return _finite(value, key)
    # Of a list the kind that holds several, else the first.
    several = [kind for kind in kinds if typing.get_origin(kind) is builtins.tuple]
    return _convert(value, several[0] if isinstance(value, list) and several else kinds[0], key, default)


def _convert_plain(value: Any, hint: Any, key: str) -> Any:  # noqa: ANN401
    if _is_exactly(value, hint):
        return _finite(value, key)
    if hint == PathText:
        # A path that must be there is missing where it is null; another one then names nothing.
        return "" if value is None else expand_home(_convert_plain(value, str, key))
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        return _number(value, key)
    if hint is str and isinstance(value, int | float):
        return str(value)
    name = hint.__name__ if isinstance(hint, type) else str(hint)
    if hint is int and (point := _decimal_point(value)):
        raise UserError(f"{key}={value} is not a whole number", fix=f"set {key}={round(float(point))}")
    raise UserError(f"{key}={value!r} is not of type {name}", fix=f"give {key} a value of type {name}")


def _is_exactly(value: object, hint: object) -> bool:
    is_one = isinstance(hint, type) and isinstance(value, hint)
    return is_one and (hint is bool or not isinstance(value, bool))


def _number(value: int | str, key: str) -> float:
    try:
        # YAML 1.1 reads 5e-6 as a string.
        number = float(value)
    except (ValueError, OverflowError) as error:
        point = _decimal_point(value)
        fix = f"write a decimal point: {key}={point}" if point else f"set {key} to a number"
        raise UserError(f"{key}={value!r} is not a number", fix=fix) from error
    return _finite(number, key)


def _finite(value: Any, key: str) -> Any:  # noqa: ANN401
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value} is not finite", fix=f"set {key} to a number, or remove it")
    return value


def _decimal_point(value: object) -> str | None:
    """A number that was written with a decimal comma, with a point; None for all else."""
    if not (isinstance(value, str) and re.fullmatch(r"[+-]?\d*,\d+([eE][+-]?\d+)?", value)):
        return None
    return value.replace(",", ".")
