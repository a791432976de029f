"""A local web server that serves a folder in pieces, and misbehaves on demand."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Behaviour:
    """What the server does: with every ``fail_every``-th GET 503, with every ``cut_every``-th half the bytes."""

    fail_every: int = 0
    cut_every: int = 0
    ranges: bool = True
    status: int = 0  # of every answer, if not 0
    url: str = ""
    gets: list[str] = field(default_factory=list)
    bytes_sent: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, folder: Path, behaviour: Behaviour, *arguments: object) -> None:
        self.folder, self.behaviour = folder, behaviour
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        behaviour, path = self.behaviour, self.folder / self.path.lstrip("/").partition("?")[0]
        number = 0
        if body:
            with behaviour.lock:
                behaviour.gets.append(f"{self.path} {self.headers.get('Range', '')}")
                number = len(behaviour.gets)
        if behaviour.status or not path.is_file():
            return self._head(behaviour.status or 404, 0)
        if body and behaviour.fail_every and number % behaviour.fail_every == 0:
            return self._head(503, 0)
        tag = str(path.stat().st_mtime_ns)
        if self.headers.get("If-Match", f'"{tag}"') != f'"{tag}"':
            return self._head(412, 0)
        data = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and behaviour.ranges:
            data = data[int(asked[1]) : int(asked[2]) + 1]
        self._head(206 if asked and behaviour.ranges else 200, len(data), etag=tag)
        if body:
            if behaviour.cut_every and number % behaviour.cut_every == 0:
                data, self.close_connection = data[: len(data) // 2], True
            behaviour.bytes_sent += len(data)
            self.wfile.write(data)

    def _head(self, status: int, size: int, etag: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(size))
        if self.behaviour.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if etag:
            self.send_header("ETag", f'"{etag}"')
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Silence."""


@contextmanager
def serving(folder: Path, behaviour: Behaviour | None = None) -> Iterator[Behaviour]:
    """Serve ``folder`` at ``Behaviour.url``, which ends in a slash."""
    behaviour = behaviour or Behaviour()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, folder, behaviour))  # type: ignore[arg-type]
    server.daemon_threads = True  # Else closing would wait for connections that their clients keep for later.
    behaviour.url = f"http://127.0.0.1:{server.server_address[1]}/"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield behaviour
    finally:
        server.shutdown()
        server.server_close()
