# SPDX-License-Identifier: Apache-2.0
"""The protocol of a server and its clients beside tensors: versions, health and refusals."""

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

PROTOCOL_VERSION = 1
TOKEN_HEADER = "triton-access-token"  # the header that callers and Triton know
CALL_HEADER = "nemo-aligner-call"  # the number of a request between the front, Triton and its endpoints

Scalar = str | int | float | bool | None


class Trouble(enum.Enum):
    """Why a server does not do what it is asked."""

    REFUSED = "refused"  # the request or a setting is wrong; again would be refused again
    FAILED = "failed"  # the model failed at it
    STALE = "stale"  # the weights are trained on fewer train requests than the asker has sent
    BUSY = "busy"  # too many requests wait; later it has room
    STOPPING = "stopping"  # the server ends or starts; another may take its place


class Refusal(Exception):
    """An error that a client gets instead of a reply."""

    def __init__(self, trouble: Trouble, message: str) -> None:
        self.trouble = trouble
        self.message = message
        super().__init__(f"{trouble.value}: {message}")

    @classmethod
    def parse(cls, text: str) -> "Refusal | None":
        """The refusal in a server's error text; None where Triton itself speaks.

        >>> Refusal.parse(str(Refusal(Trouble.REFUSED, "tokens[0, 2] is -1"))).message
        'tokens[0, 2] is -1'
        """
        kind, _, message = text.partition(": ")
        return cls(Trouble(kind), message) if kind in {trouble.value for trouble in Trouble} else None


def error_text(payload: bytes) -> str:
    """The message in the body of an error reply.

    >>> error_text(b'{"error": "refused: tokens is empty"}')
    'refused: tokens is empty'
    """
    text = payload.decode(errors="replace")
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return text


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of the served model."""

    vocab_size: int  # token ids below it are known
    seq_length: int  # tokens of the longest sequence


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """The limits of one request, each a setting of the server's job."""

    rows: int = 8192  # max_request_rows
    bytes: int = 2**30  # max_request_bytes, unpacked
    waiting: int = 256  # max_waiting_requests: those that have no reply yet
    seconds: float = 3600.0  # request_timeout: to its reply


@dataclass(frozen=True, kw_only=True)
class RequestVersion:
    """The weights that a request is for, so that neither a retry nor a restart changes what is computed.

    Requests without one, such as those of a NeMo-Aligner client, are served by the current weights.
    """

    run_id: str
    step: int  # of the actor
    # Train requests of the run that the critic is trained on when this one is done, itself included.
    sequence: int


@dataclass(frozen=True, kw_only=True)
class Health:
    """The state of a server. ``run_id``, ``sequence`` and ``last_loss`` outlive a restart in its checkpoint."""

    model: str
    step: int  # optimizer steps
    vocab_size: int
    seq_length: int
    settings: Mapping[str, Scalar] = field(default_factory=dict)  # for the actor to compare with its own
    run_id: str = ""  # of the actor it learns from; empty until the first train request
    sequence: int = 0  # train requests of that run that the weights are trained on
    last_loss: float | None = None  # the reply to the last of them
    busy: str = ""  # what it is doing: infer, train, save, or nothing
    protocol: int = PROTOCOL_VERSION
