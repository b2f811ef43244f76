"""A server on the loopback that answers what huggingface_hub asks of the hub: a model's file list, and its files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """`files` of the one model `model_id`. `requests` are (method, file or "list").

    A GET of a file in `hang_on` sets `hanging` after its first byte and waits until the server closes.
    """

    model_id: str
    files: dict[str, bytes]
    requests: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    hang_on: set[str] = field(default_factory=set[str])
    hanging: threading.Event = field(default_factory=threading.Event)
    closing: threading.Event = field(default_factory=threading.Event)
    port: int = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def gets(self, name: str) -> int:
        return self.requests.count(("GET", name))


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(send_body=False)

        def do_GET(self) -> None:
            self._answer(send_body=True)

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _answer(self, *, send_body: bool) -> None:
            path = self.path.partition("?")[0]
            resolve = f"/{hub.model_id}/resolve/"
            if path.startswith(f"/api/models/{hub.model_id}"):
                hub.requests.append((self.command, "list"))
                self._send_json(200, self._model_info())
            elif path.startswith(resolve) and (name := path.removeprefix(resolve).split("/", 1)[1]) in hub.files:
                hub.requests.append((self.command, name))
                self._send_file(name, send_body=send_body)
            else:
                self._send_json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

        def _model_info(self) -> dict[str, object]:
            siblings = [{"rfilename": name, "size": len(content)} for name, content in hub.files.items()]
            return {"id": hub.model_id, "modelId": hub.model_id, "sha": COMMIT, "tags": [], "siblings": siblings}

        def _send_json(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            for key, text in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(key, text)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _send_file(self, name: str, *, send_body: bool) -> None:
            content = hub.files[name]
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            self.send_response(206 if start else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if send_body:
                self._send_body(name, content[start:])

        def _send_body(self, name: str, body: bytes) -> None:
            if name not in hub.hang_on:
                self.wfile.write(body)
                return
            self.wfile.write(body[:1])
            self.wfile.flush()
            hub.hanging.set()
            hub.closing.wait(60)
            self.close_connection = True

    return Handler


@contextmanager
def serve_hub(hub: FakeHub) -> Generator[FakeHub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
