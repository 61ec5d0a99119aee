# SPDX-License-Identifier: Apache-2.0
"""The body of a request, read within limits: its size, its time, and how deep its JSON is nested."""

import asyncio
import re

import aiohttp
import numpy as np
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from nemo_aligner.serving.protocol import Refusal, Trouble

BODY_SECONDS = 60.0  # without a byte of a request's body
STATUS = {Trouble.REFUSED: 400, Trouble.FAILED: 500, Trouble.BUSY: 503, Trouble.STOPPING: 503}
MAX_NESTING = 64
# A string that does not end lasts to the end: it is no JSON, and nothing in it is read.
_STRING = re.compile(rb'"(?:[^"\\]|\\[\s\S])*+(?:"|\\?\Z)')
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class Refused(Exception):
    """A refusal with the status of its HTTP reply."""

    def __init__(self, trouble: Trouble, message: str, *, status: int | None = None) -> None:
        self.status, self.refusal = status or STATUS[trouble], Refusal(trouble, message)


async def read_body(name: str, request: web.Request, *, limit: int, setting: str) -> bytearray:
    """The body, unpacked.

    Args:
        name: of the endpoint.
        limit: bytes.
        setting: the section of max_request_bytes.

    Raises:
        Refused: it is too large, comes too slowly, cannot be read, or is nested too deep.
    """
    key, body = f"{setting}.max_request_bytes", bytearray()
    too_large = Refused(
        Trouble.REFUSED,
        f"{name}: the request has more than {key}={limit} bytes\n"
        f"Fix: send fewer rows in a request, or set {key} higher",
        status=413,
    )
    if (request.content_length or 0) > limit:
        raise too_large
    try:
        while chunk := await asyncio.wait_for(request.content.readany(), BODY_SECONDS):
            body += chunk
            if len(body) > limit:
                raise too_large
    except TimeoutError:
        text = f"{name}: no byte of the body came for {BODY_SECONDS:g} s\nFix: send it whole"
        raise Refused(Trouble.REFUSED, text, status=408) from None
    except (HttpProcessingError, aiohttp.ClientPayloadError, web.RequestPayloadError) as error:
        text = f"{name}: the body cannot be read: {error}\nFix: send it whole"
        raise Refused(Trouble.REFUSED, text) from None
    # The JSON comes first; where its size is not a plain number, all of it is checked.
    json_size = re.fullmatch(r"[1-9][0-9]{0,17}", request.headers.get("Inference-Header-Content-Length", ""))
    if nesting(body[: int(json_size[0])] if json_size else body) > MAX_NESTING:
        text = f"the request's JSON is nested more than {MAX_NESTING} deep\nFix: send tensors as flat lists"
        raise Refused(Trouble.REFUSED, f"{name}: {text}")
    return body


def nesting(text: bytes | bytearray) -> int:
    """The most brackets that are open at once, outside of strings.

    >>> nesting(b'{"a": [[1, 2], "[[[\\\\"[["]}')
    3
    """
    brackets = _STRING.sub(b"", text).translate(None, _NOT_BRACKETS)
    if not brackets:
        return 0
    opens = np.isin(np.frombuffer(brackets, dtype=np.uint8), list(b"[{"))
    return max(0, int(np.cumsum(np.where(opens, 1, -1), dtype=np.int64).max()))
