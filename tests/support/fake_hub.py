"""A Hugging Face hub on loopback with one model repository, as far as fetching a snapshot needs one."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class FakeHub:
    """`revisions` maps commits, branches and tags to commits; all hold the same `files`. `fetched` lists downloads."""

    model: str
    files: dict[str, bytes]
    revisions: dict[str, str]
    endpoint: str = ""
    fetched: list[str] = field(default_factory=list)


@contextmanager
def serve_hub(hub: FakeHub) -> Iterator[FakeHub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, name="fake hub")
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, with_body: bool) -> None:
            path = self.path.split("?")[0]
            info = f"/api/models/{hub.model}/revision/"
            resolve = f"/{hub.model}/resolve/"
            if path.startswith(f"/api/models/{hub.model}/tree/"):
                tree = [
                    {"type": "file", "path": name, "size": len(content), "oid": sha1(content).hexdigest()}
                    for name, content in hub.files.items()
                ]
                self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, with_body)
            elif path.startswith(info) and path.removeprefix(info) in hub.revisions:
                siblings = [{"rfilename": name} for name in hub.files]
                commit = hub.revisions[path.removeprefix(info)]
                body = json.dumps({"id": hub.model, "sha": commit, "siblings": siblings}).encode()
                self._send(200, body, {"Content-Type": "application/json"}, with_body)
            elif path.startswith(resolve):
                commit, _, name = path.removeprefix(resolve).partition("/")
                content = hub.files[name]
                if with_body:
                    hub.fetched.append(name)
                headers = {"X-Repo-Commit": commit, "ETag": f'"{sha1(content).hexdigest()}"'}
                self._send(200, content, headers, with_body)
            else:
                unknown = "RevisionNotFound" if path.startswith(info) else "RepoNotFound"
                self._send(404, b"", {"X-Error-Code": unknown}, with_body)

        def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    return Handler
