# SPDX-License-Identifier: Apache-2.0
"""Checks of a request's tensors. Errors name the endpoint, the tensor, the place and the value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_aligner.errors import UserError
from nemo_aligner.serving.protocol import Limits


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor of an endpoint. Named sizes ("N", "S", "S-1") agree among the tensors of a request."""

    name: str
    dtype: type[np.generic]
    shape: tuple[str | int, ...]
    optional: bool = False


def check_shapes(endpoint: str, arrays: Mapping[str, NDArray[Any]], specs: Sequence[TensorSpec]) -> None:
    """Raises UserError unless each tensor has its dtype and its shape, and none is empty."""
    sizes: dict[str | int, int] = {}
    for spec in specs:
        if spec.name not in arrays:
            if spec.optional:
                continue
            raise refuse(endpoint, f"{spec.name} is missing", "send every tensor of this endpoint")
        array = arrays[spec.name]
        is_bytes = spec.dtype is np.bytes_
        if array.dtype.kind not in "OS" if is_bytes else array.dtype != spec.dtype:
            wanted = "bytes" if is_bytes else np.dtype(spec.dtype).name
            raise refuse(endpoint, f"{spec.name} is {array.dtype.name}, not {wanted}", f"send {wanted}")
        if not _fits(array.shape, spec.shape, sizes):
            wanted = ", ".join(str(sizes.get(size, size)) for size in spec.shape)
            raise refuse(endpoint, f"{spec.name} is {list(array.shape)}", f"its shape is [{wanted}]")
        if array.size == 0:
            raise refuse(endpoint, f"{spec.name} is empty: {list(array.shape)}", "send at least one token")


def _fits(found: tuple[int, ...], wanted: tuple[str | int, ...], sizes: dict[str | int, int]) -> bool:
    """True if a shape is as wanted; sizes named for the first time are noted."""
    if len(found) != len(wanted):
        return False
    for size, name in zip(found, wanted, strict=True):
        if isinstance(name, str) and name not in sizes:
            sizes |= {name: size, f"{name}-1": size - 1}
    return all(size == sizes.get(name, name) for size, name in zip(found, wanted, strict=True))


def refuse(endpoint: str, problem: str, fix: str) -> UserError:
    """The error that names the endpoint."""
    return UserError(f"{endpoint}: {problem}", fix=fix)


def first_index(wrong: NDArray[np.bool_]) -> tuple[int, ...]:
    """Where the first True is."""
    return tuple(int(i) for i in np.argwhere(wrong)[0])


def check_tokens(endpoint: str, tokens: NDArray[np.int64], limits: Limits) -> None:
    """Raises UserError at a token id that the model does not know."""
    wrong = (tokens < 0) | (tokens >= limits.vocab_size)
    if wrong.any():
        at = first_index(wrong)
        raise refuse(
            endpoint,
            f"tokens{list(at)} is {tokens[at]}, outside the vocabulary of {limits.vocab_size} tokens",
            "use the tokenizer of the served model on both sides",
        )


def check_lengths(endpoint: str, lengths: NDArray[np.int64], width: int, limits: Limits) -> None:
    """Raises UserError at a row that is empty, negative, or longer than the request (``width``) or the model."""
    for row, length in enumerate(lengths.tolist()):
        if length < 0:
            raise refuse(
                endpoint, f"sequence_lengths[{row}] is {length}, a negative length", "send its tokens"
            )
        if length == 0:
            raise refuse(endpoint, f"row {row} is empty", "send at least one token in each row")
        if length > limits.seq_length:
            raise refuse(
                endpoint,
                f"row {row} is over-long: {length} tokens, and the served model takes {limits.seq_length}",
                "shorten it, or serve a model with a larger model.encoder_seq_length",
            )
        if length > width:
            raise refuse(
                endpoint,
                f"sequence_lengths[{row}] is {length}, but tokens has {width} columns",
                "send the number of tokens in each row",
            )


def check_finite(endpoint: str, name: str, array: NDArray[np.floating], *, most: float) -> None:
    """Raises UserError at a number that is infinite, none, or beyond +-``most``."""
    wrong = ~(np.abs(array) <= most)
    if wrong.any():
        at = first_index(wrong)
        raise refuse(endpoint, f"{name}{list(at)} is {array[at]:g}", f"send numbers within +-{most:g}")
