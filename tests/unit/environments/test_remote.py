# SPDX-License-Identifier: Apache-2.0
"""Rewards of services, over real sockets: what is asked, what is asked again, and what is told."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from nemo_aligner.environments.remote import Environment, judge, score

Replies = list[tuple[int, Any]]
GIVEN = {"prompt": "2+2?", "response": "4", "tokens": [4], "row": {"id": 7}}


@pytest.fixture
def service() -> Iterator[Callable[[Replies], tuple[str, list[dict[str, Any]]]]]:
    """Starts a service that gives these replies, one after the other; its address, and what it was asked."""
    servers: list[ThreadingHTTPServer] = []

    def start(replies: Replies) -> tuple[str, list[dict[str, Any]]]:
        asked: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                asked.append(json.loads(body) | {"path": self.path, "key": self.headers["Authorization"]})
                code, reply = replies.pop(0)
                if code == 0:  # hangs up
                    return
                self.send_response(code)
                self.end_headers()
                self.wfile.write(reply if isinstance(reply, bytes) else json.dumps(reply).encode())

            def log_message(self, *_: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def said(text: str | None) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def test_a_service_gets_the_response_and_gives_the_reward(service: Callable[..., Any]):
    url, asked = service([(200, {"reward": 0.25})])
    assert score(url=f"{url}/score", **GIVEN) == 0.25
    assert asked == [{"prompt": "2+2?", "response": "4", "row": {"id": 7}, "path": "/score", "key": None}]


def test_a_service_that_cannot_reply_yet_is_asked_again(service: Callable[..., Any]):
    url, asked = service([(503, b""), (0, b""), (429, b"later"), (200, {"reward": 1})])
    assert score(url=url, **GIVEN) == 1
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ((400, b"no such task"), "refuses with 400 Bad Request: no such task"),
        ((200, b"<html>"), "replies no JSON: b'<html>'"),
        ((200, {"score": 1}), r"replies {'score': 1}, and not {\"reward\": NUMBER}"),
        ((200, [1]), "and not"),
    ],
)
def test_a_service_that_replies_otherwise_is_told(
    service: Callable[..., Any], reply: tuple[int, Any], words: str
):
    url, _ = service([reply])
    with pytest.raises(ValueError, match=words):
        score(url=url, **GIVEN)


def test_a_language_model_judges_in_words(service: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    url, asked = service([(200, said("Right. Score: 4")), (200, said("None: 9")), (200, said(None))])
    monkeypatch.setenv("JUDGES_KEY", "secret")
    arguments = {"url": f"{url}/v1/", "model": "large", "key_variable": "JUDGES_KEY", "low": 1.0}
    assert [judge(**GIVEN, **arguments) for _ in range(3)] == [4.0, 1.0, 1.0]
    assert asked[0]["path"] == "/v1/chat/completions"
    assert asked[0]["key"] == "Bearer secret"
    assert asked[0]["model"] == "large"
    (message,) = asked[0]["messages"]
    assert message["role"] == "user"
    assert "Question:\n2+2?" in message["content"]
    assert "Response:\n4" in message["content"]


def test_what_is_no_judge_is_told(service: Callable[..., Any]):
    url, _ = service([(200, {"error": "overloaded"}), (401, b"no key")])
    with pytest.raises(ValueError, match="which is no chat completion"):
        judge(**GIVEN, url=url, model="a")
    with pytest.raises(ValueError, match="refuses with 401 Unauthorized: no key"):
        judge(**GIVEN, url=url, model="a")
    with pytest.raises(TypeError, match="unexpected keyword argument 'mode'"):
        judge(**GIVEN, url=url, model="a", mode="b")


def test_a_game_elsewhere_is_played_in_turns(service: Callable[..., Any]):
    """A step whose reply was lost is asked again under its number."""
    replies = [
        (200, {"episode": "a7"}),
        (200, {"reply": "higher", "reward": 0}),
        (0, b""),
        (200, {"reply": None, "reward": 1.5}),
    ]
    url, asked = service(replies)
    game = Environment(url)
    game.reset({"id": 7}, seed=3)
    assert (game.step("4"), game.step("5")) == (("higher", 0), (None, 1.5))
    seen = [{name: one[name] for name in one if name != "key"} for one in asked]
    steps = [
        {"path": "/step", "episode": "a7", "number": n, "turn": turn} for n, turn in ((1, "4"), (2, "5"))
    ]
    assert seen == [{"path": "/reset", "row": {"id": 7}, "seed": 3}, steps[0], steps[1], steps[1]]


def test_a_game_that_replies_otherwise_is_reported(service: Callable[..., Any]):
    url, _ = service([(200, {"episode": 1}), (200, {"reply": "?"})])
    game = Environment(url)
    game.reset({}, seed=0)
    with pytest.raises(ValueError, match=r"/step replies {'reply': '\?'}, without reply and reward"):
        game.step("4")
