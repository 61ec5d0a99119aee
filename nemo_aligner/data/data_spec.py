# SPDX-License-Identifier: Apache-2.0
"""``model.data.data_prefix`` in each of its forms, as one typed description. Opens no file."""

import difflib
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nemo_aligner.errors import UserError
from nemo_aligner.paths import expand_home

_KEY = "model.data.data_prefix"
_EXAMPLE = f"{_KEY}={{train: [train.jsonl], validation: [validation.jsonl], test: [test.jsonl]}}"
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Where the rows of one split stand."""

    paths: tuple[str, ...]
    weights: tuple[float, ...] = ()  # each path's share of an epoch's rows, sum 1; empty: every row once
    start: float = 0.0  # the part of each file that is read, as shares of its rows
    stop: float = 1.0
    in_two: bool = False  # each part of a cut has a row where there are two
    cut_by: str = field(default="", compare=False)  # the setting that cuts the files, as messages name it

    def rows(self, num_rows: int) -> range:
        """Which of a file's ``num_rows`` rows belong to this split.

        >>> parts = parse_data_spec(["a.jsonl"], "98,1,1")
        >>> parts.train.rows(300), parts.test.rows(300)
        (range(0, 294), range(297, 300))
        """
        return range(self._border(self.start, num_rows), self._border(self.stop, num_rows))

    def rows_of(self, path: str | Path, num_rows: int, *, unit: str) -> range:
        """As :meth:`rows`, of the file ``path``.

        Raises:
            UserError: the file has rows, and none of them belongs to this split.
        """
        rows = self.rows(num_rows)
        if num_rows and not rows:
            raise UserError(
                f"{self.cut_by} leaves none of the {num_rows} {unit} of {path} for a split",
                fix="give the split a greater share, or a file of its own",
            )
        return rows

    def cut(self, share: float, setting: str) -> tuple["Split", "Split"]:
        """All but the last ``share`` of its rows, and those, each once; both parts have a row where there are two.

        ``setting`` is the name of what says the share.
        """
        both = replace(self, in_two=True, cut_by=f"{setting}={share}")
        return replace(both, stop=1 - share), replace(both, start=1 - share, weights=())

    def _border(self, share: float, num_rows: int) -> int:
        border = round(share * num_rows)
        return min(max(border, 1), num_rows - 1) if self.in_two and 0 < share < 1 < num_rows else border


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """The splits of a run."""

    train: Split
    validation: Split | None  # None: there is none
    test: Split | None  # None: not given, or without a share
    extra_validation: Mapping[str, Split]  # more validation sets, by keys such as "validation_math"

    @property
    def paths(self) -> tuple[str, ...]:
        """All files, each once."""
        splits = [self.train, self.validation, *self.extra_validation.values(), self.test]
        return tuple(dict.fromkeys(path for split in splits if split is not None for path in split.paths))


def share_of(value: object) -> float:
    """The share of the training rows that a validation set is; 0 where it is something else.

    >>> share_of("0.1"), share_of("rows.jsonl"), share_of("1"), share_of(None)
    (0.1, 0.0, 0.0, 0.0)
    """
    share = float(str(value)) if _NUMBER.fullmatch(str(value)) else 0.0
    return share if 0 < share < 1 else 0.0


def parse_data_spec(value: object, splits_string: str | None) -> DataSpec:
    """The splits that ``model.data.data_prefix`` and ``model.data.splits_string`` describe.

    Each split is a path, a list of paths, or weights before paths, ``[0.3, a.jsonl, 0.7, b.jsonl]``.

    Args:
        value: ``{train, validation, test, validation*}``, a split each, of which validation may be a share below 1, the
            last rows of each training file; or one split for all three.
        splits_string: in the second form the shares of train, validation and test, ``"98,1,1"``: each file is
            cut into them in its own order.

    Raises:
        UserError: the form is none of these, or a split is missing.
    """
    match value:
        case None:
            raise UserError(f"{_KEY} is not set", fix=f'set it, as in "{_EXAMPLE}"')
        case Mapping():
            if splits_string is not None:
                raise UserError(
                    f"model.data.splits_string={splits_string!r} cuts files, but {_KEY} names them split by split",
                    fix="set model.data.splits_string=null",
                )
            return _by_name({str(name): split for name, split in value.items()})
        case _:
            return _by_share(parse_split(value, _KEY), splits_string)


def _by_name(given: Mapping[str, object]) -> DataSpec:
    for name in given:
        if name not in ("train", "test") and not name.startswith("validation"):
            near = difflib.get_close_matches(name, ("train", "validation", "test"), n=1, cutoff=0.4)
            known = near[0] if near else "train, validation, test"
            raise UserError(
                f"{_KEY} has the key {name!r}",
                fix=f"use {known}; further validation sets have names that start with validation",
            )
    if given.get("train") is None:
        raise UserError(f"{_KEY} has no 'train'; it has {sorted(given)}", fix=f'write "{_EXAMPLE}"')
    share = share_of(given.get("validation"))
    splits = {
        name: parse_split(split, f"{_KEY}.{name}")
        for name, split in given.items()
        if split is not None and not (share and name == "validation")
    }
    if share:
        splits["train"], splits["validation"] = splits["train"].cut(share, f"{_KEY}.validation")
    extra = {name: split for name, split in splits.items() if name not in ("train", "validation", "test")}
    return DataSpec(
        train=splits["train"],
        validation=splits.get("validation"),
        test=splits.get("test"),
        extra_validation=extra,
    )


def _by_share(split: Split, splits_string: str | None) -> DataSpec:
    if splits_string is None:
        raise UserError(
            f"{_KEY} names files for all splits, and model.data.splits_string does not say how to cut them",
            fix=f'set model.data.splits_string="98,1,1", or write "{_EXAMPLE}"',
        )
    words = [word.strip() for word in re.split("[,/]", splits_string)]
    shares = [float(word) for word in words if _NUMBER.fullmatch(word)]
    are_shares = len(shares) == len(words) and len(words) in (2, 3) and min(shares) >= 0
    if not (are_shares and math.isfinite(sum(shares))):
        raise UserError(
            f"model.data.splits_string={splits_string!r} is not two or three numbers",
            fix='write the shares of train, validation and test, as in "98,1,1"',
        )
    if not (shares[0] > 0 and shares[1] > 0):
        raise UserError(
            f"model.data.splits_string={splits_string!r} leaves nothing for {'validation' if shares[0] else 'train'}",
            fix='give both a share, as in "98,1,1"',
        )
    total = sum(shares)
    split = replace(split, cut_by=f"model.data.splits_string={splits_string!r}")
    train_stop, validation_stop = shares[0] / total, (shares[0] + shares[1]) / total
    has_test = len(shares) == 3 and shares[2] > 0
    return DataSpec(
        train=replace(split, stop=train_stop),
        validation=replace(split, start=train_stop, stop=validation_stop if has_test else 1.0),
        test=replace(split, start=validation_stop) if has_test else None,
        extra_validation={},
    )


def parse_split(value: object, key: str) -> Split:
    """One split: a path, a list of paths, or weights before paths; ``key`` is its setting.

    Raises:
        UserError: the form is none of these.
    """
    items = value if isinstance(value, list | tuple) else [value]
    if not items:
        raise UserError(f"{key} is an empty list", fix="name at least one JSONL file")
    if _is_number(items[0]):
        return _weighted(items, key)
    return Split(paths=tuple(_path(item, key, place) for place, item in enumerate(items, start=1)))


def _weighted(items: Sequence[object], key: str) -> Split:
    weights, paths = [], []
    for place, item in enumerate(items, start=1):
        if place % 2:
            weights.append(_weight(item, key, place))
        else:
            paths.append(_path(item, key, place))
    if len(weights) != len(paths):
        raise UserError(
            f"{key} ends with the weight {items[-1]}", fix="name the file that it belongs to after it"
        )
    total = sum(weights)
    if not math.isfinite(total):
        raise UserError(f"the weights of {key} add up to more than any number", fix="give smaller weights")
    return Split(paths=tuple(paths), weights=tuple(weight / total for weight in weights))


def _is_number(item: object) -> bool:
    if isinstance(item, str):
        return bool(_NUMBER.fullmatch(item.strip()))
    if isinstance(item, bool) or not isinstance(item, int | float):
        return False
    # An int may be larger than any float.
    return isinstance(item, float) or abs(item) <= sys.float_info.max


def _weight(item: object, key: str, place: int) -> float:
    if not _is_number(item):
        raise UserError(
            f"entry {place} of {key} is {item!r}, where a weight belongs",
            fix="write weights before their paths, as in [0.3, a.jsonl, 0.7, b.jsonl]",
        )
    assert isinstance(item, int | float | str)
    weight = float(item)
    if not (math.isfinite(weight) and weight > 0):
        raise UserError(
            f"entry {place} of {key} is the weight {weight:g}",
            fix="give a weight above 0, or leave its file out",
        )
    return weight


def _path(item: object, key: str, place: int) -> str:
    if not isinstance(item, str) or _is_number(item) or not item:
        raise UserError(
            f"entry {place} of {key} is {item!r}, where a path belongs",
            fix="write paths alone, [a.jsonl, b.jsonl], or a weight before each, [0.3, a.jsonl, 0.7, b.jsonl]",
        )
    return expand_home(item)
