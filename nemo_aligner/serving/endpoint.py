# SPDX-License-Identifier: Apache-2.0
"""Endpoints: their names, and the calls that their functions get. Knows nothing of PyTriton."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nemo_aligner.serving.checks import TensorSpec
from nemo_aligner.serving.protocol import Refusal
from nemo_aligner.serving.wire import Arrays


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request to an endpoint."""

    arrays: Arrays
    is_gone: Callable[[], bool] = lambda: False  # whether nobody waits for the reply any more


Handle = Callable[[Sequence[Call]], Sequence[Arrays | Refusal]]


@dataclass(frozen=True)
class Endpoint:
    """A name that requests are sent to.

    Attributes:
        handle: called in a thread of PyTriton's with one request, or with several if they may linger: a reply or a
            refusal for each, in order.
        linger_seconds: how long a request waits for others, of any shape. If set, the first size of each tensor is
            the batch's, which Triton counts.
    """

    name: str
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    handle: Handle
    linger_seconds: float | None = None
