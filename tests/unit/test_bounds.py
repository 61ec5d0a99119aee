# SPDX-License-Identifier: Apache-2.0
"""A setting's range stands beside its default; one walker refuses what is outside, by its dotted key."""

import dataclasses
from dataclasses import dataclass, field

import pytest

from nemo_aligner.bounds import bounded, check_bounds, one_of, only
from nemo_aligner.errors import UserError

TOLD = ("{key}={value} of {name} is too small", "give {key} {range}")


@dataclass(frozen=True, kw_only=True)
class Inner:
    name: str = "inner"
    rows: int | tuple[int, ...] | None = bounded(None, at_least=1)
    share: float = bounded(0.5, above=0, below=1, to="between 0 and 1", message=TOLD)
    port: int = bounded(5555, at_least=1, at_most=65535)


@dataclass(frozen=True, kw_only=True)
class Other(Inner):
    port: int = 80


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = field(default_factory=Inner)


def test_a_field_has_its_default():
    assert dataclasses.asdict(Other()) == {"name": "inner", "rows": None, "share": 0.5, "port": 80}


@pytest.mark.parametrize(
    "inner", [Inner(), Inner(rows=1), Inner(rows=(2, 4)), Inner(port=65535), Other(port=1)]
)
def test_what_is_in_range_passes(inner: Inner):
    check_bounds(Outer(inner=inner))


@pytest.mark.parametrize(
    ("inner", "problem", "fix"),
    [
        (Inner(rows=0), "inner.rows=0 is out of range", "set inner.rows to 1 or more"),
        (Inner(rows=(2, 0)), "inner.rows=0 is out of range", "set inner.rows to 1 or more"),
        (Inner(share=0.0), "inner.share=0.0 of inner is too small", "give inner.share between 0 and 1"),
        (Inner(share=1.0), "inner.share=1.0 of inner is too small", "give inner.share between 0 and 1"),
        (
            Inner(share=float("nan")),
            "inner.share=nan of inner is too small",
            "give inner.share between 0 and 1",
        ),
        (Inner(port=65536), "inner.port=65536 is out of range", "set inner.port to 1 to 65535"),
        (Other(port=0), "inner.port=0 is out of range", "set inner.port to 1 to 65535"),
    ],
)
def test_what_is_not_is_refused_by_its_key(inner: Inner, problem: str, fix: str):
    with pytest.raises(UserError) as error:
        check_bounds(Outer(inner=inner))
    assert (error.value.problem, error.value.fix) == (problem, fix)


def test_a_block_may_be_named():
    with pytest.raises(UserError, match=r"trainer\.ppo\.port=0"):
        check_bounds(Inner(port=0), "trainer.ppo")


@dataclass(frozen=True)
class Choices:
    name: str = one_of("left", "right")
    off: bool | None = only(False, None, what="this")
    size: int = only(1)


@pytest.mark.parametrize(
    ("given", "problem", "fix"),
    [
        ({"name": "up"}, "a.name='up' is not known", "use left or right"),
        ({"off": True}, "a.off=True: this is not supported", "set a.off=False"),
        ({"off": 0}, "a.off=0: this", "set a.off=False"),
        ({"size": 2}, "a.size=2 is not supported", "set a.size=1"),
    ],
)
def test_a_choice_is_refused_by_the_values_that_there_are(given, problem, fix):
    check_bounds(Choices(), "a")
    check_bounds(Choices(off=None, name="right"), "a")
    with pytest.raises(UserError) as caught:
        check_bounds(Choices(**given), "a")
    assert problem in caught.value.problem
    assert caught.value.fix == fix
