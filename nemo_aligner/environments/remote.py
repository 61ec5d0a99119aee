# SPDX-License-Identifier: Apache-2.0
"""Rewards from elsewhere: a service of one's own, or a language model behind an endpoint like OpenAI's.

    trainer.ppo.rewards.NAME.function=nemo_aligner.environments.remote.score
    "trainer.ppo.rewards.NAME.arguments={url: 'http://judge:8000/score'}"

    trainer.ppo.rewards.NAME.environment=nemo_aligner.environments.remote.Environment
    "trainer.ppo.rewards.NAME.arguments={url: 'http://games:8000'}"

A service that is not there, or has too much to do, is asked again until the call's ``timeout``. Each process waits for
one reply: ``workers`` says how many are asked for at once.
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_aligner.environments import evaluation

_LONGEST_PAUSE = 8.0  # seconds
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_LONGEST_BODY = 1000  # characters of one that an error shows


def score(*, url: str, prompt: str, response: str, row: Mapping[str, Any], **_: object) -> float:
    """Return the reward of a service that gets {"prompt", "response", "row"} and replies {"reward"}, both JSON by POST.

    Args:
        url: of the service.
        prompt: the text.
        response: to it.
        row: the prompt's JSON object.

    Raises:
        ValueError: it replies otherwise.
    """
    reply = _post(url, {"prompt": prompt, "response": response, "row": row}, {})
    if not isinstance(reply, dict) or not isinstance(reply.get("reward"), int | float):
        raise ValueError(f'{url} replies {str(reply)[:_LONGEST_BODY]}, and not {{"reward": NUMBER}}')
    return reply["reward"]


class Environment:
    """An environment of several turns that a service has: ``trainer.ppo.rewards.NAME.environment`` names this class.

    POST ``url/reset`` gets {"row", "seed"} and replies {"episode"}, anything that names it. POST ``url/step`` gets
    {"episode", "number", "turn"} and replies {"reply", "reward"}, the reply being a text, messages or null at the end.
    A step that is asked again, because its reply was lost, has the number that it had.

    Raises:
        ValueError: the service replies otherwise.
    """

    def __init__(self, url: str) -> None:
        self._url, self._number = url.rstrip("/"), 0

    def reset(self, row: Mapping[str, Any], seed: int) -> None:
        """Begin an episode."""
        self._episode = self._ask("reset", {"row": row, "seed": seed}, "episode")[0]

    def step(self, turn: str) -> tuple[Any, float]:
        """Return the service's reply and reward."""
        self._number += 1
        asked = {"episode": self._episode, "number": self._number, "turn": turn}
        reply, reward = self._ask("step", asked, "reply", "reward")
        return reply, reward

    def _ask(self, name: str, body: Mapping[str, Any], *keys: str) -> list[Any]:
        reply = _post(f"{self._url}/{name}", body, {})
        if not isinstance(reply, dict) or not set(keys) <= reply.keys():
            raise ValueError(
                f"{self._url}/{name} replies {str(reply)[:_LONGEST_BODY]}, without {' and '.join(keys)}"
            )
        return [reply[key] for key in keys]


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """The ``arguments`` of :func:`judge`."""

    url: str  # up to /v1
    model: str  # its name there
    # a text file that asks for a score, with {prompt} and {response} in it; None: points from 0 to 5 for being of help
    template: str | None = None
    pattern: str = evaluation.PATTERN  # a regular expression, whose group is the score; the last match counts
    low: float = 0.0  # the lowest score, and the reward where there is none
    high: float = 5.0  # the highest; a number outside is none
    max_tokens: int = 512  # of the reply
    temperature: float = 0.0  # of the reply
    key_variable: str = (
        "OPENAI_API_KEY"  # the environment variable with the key, where the endpoint asks for one
    )


def judge(*, prompt: str, response: str, tokens: object, row: object, **arguments: Any) -> float:  # noqa: ANN401
    """Return the score that a language model gives in words: of ``POST url/chat/completions``, as OpenAI's API has it.

    Args:
        prompt: the text.
        response: to it.
        tokens: not read.
        row: not read.
        arguments: of :class:`Endpoint`.

    Raises:
        ValueError: the endpoint refuses, or replies otherwise.
    """
    del tokens, row
    asked = Endpoint(**arguments)
    template = evaluation.read_template(asked.template, setting="arguments.template")
    question = evaluation.fill(template, prompt=prompt, response=response)
    body = {
        "model": asked.model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": asked.max_tokens,
        "temperature": asked.temperature,
    }
    key = os.environ.get(asked.key_variable)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    reply = _post(f"{asked.url.rstrip('/')}/chat/completions", body, headers)
    try:
        text = reply["choices"][0]["message"]["content"] or ""
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{asked.url} replies {str(reply)[:_LONGEST_BODY]}, which is no chat completion"
        ) from error
    found = evaluation.read_score(text, asked.pattern)
    return evaluation.mean_score([found], low=asked.low, high=asked.high)


def _post(url: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> Any:  # noqa: ANN401 - of JSON
    """Return the reply; the call's clock ends an endless wait.

    Raises:
        ValueError: the service refuses the request, or its reply is not JSON.
    """
    data, pause = json.dumps(body).encode(), 0.25
    while True:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request) as reply:
                text = reply.read()
        except urllib.error.HTTPError as error:
            if error.code not in _AGAIN:
                text = error.read().decode(errors="replace")[:_LONGEST_BODY]
                raise ValueError(f"{url} refuses with {error.code} {error.reason}: {text}") from error
        except (OSError, http.client.HTTPException):  # not there, or gone meanwhile
            pass
        else:
            return _json(url, text)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def _json(url: str, text: bytes) -> Any:  # noqa: ANN401
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{url} replies no JSON: {text[:_LONGEST_BODY]!r}") from error
