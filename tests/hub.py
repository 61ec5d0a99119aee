# SPDX-License-Identifier: Apache-2.0
"""A model hub on 127.0.0.1 that has one model, for huggingface_hub's own client."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "a" * 40


@contextlib.contextmanager
def serving(name: str, folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which the hub has the model ``name``, whose files are those of ``folder``, and no other."""

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.reply(with_body=False)

        def do_GET(self) -> None:
            self.reply(with_body=True)

        def log_message(self, *_: object) -> None:
            pass

        def reply(self, *, with_body: bool) -> None:
            content = response(self.path, name, folder)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(content or b"").hexdigest()}"')
            self.end_headers()
            if with_body:
                self.wfile.write(content or b"")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def response(path: str, name: str, folder: Path) -> bytes | None:
    files = sorted(file for file in folder.iterdir() if file.is_file())
    if path.startswith(f"/api/models/{name}/tree/"):
        tree = [
            {
                "type": "file",
                "path": file.name,
                "size": file.stat().st_size,
                "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
            }
            for file in files
        ]
        return json.dumps(tree).encode()
    if path.startswith(f"/api/models/{name}/"):
        siblings = [{"rfilename": file.name} for file in files]
        return json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()
    wanted = [file for file in files if path == f"/{name}/resolve/{COMMIT}/{file.name}"]
    return wanted[0].read_bytes() if wanted else None
