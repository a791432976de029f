"""A web server for a person's own machine or a laboratory's network: what its pages share, and what it refuses.

Only standard library. A page's server gives routes; here are the checks that each request must pass (a Host that no other
web site can give, an Origin that is this server's, limits on bodies, connections and pace) and the headers of each answer.
"""

from __future__ import annotations

import ipaddress
import json
import re
import socket
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Final, TypeVar
from urllib.parse import parse_qs, urlsplit

from paradiffusion.errors import UserError

MAX_BODY: Final = 1 << 16
NUMBER: Final = re.compile(r"[0-9]{1,9}")
Query = Mapping[str, list[str]]
H = TypeVar("H", bound="LocalHandler")


class Refused(Exception):
    """A request that is answered with a status and one sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class LocalServer(ThreadingHTTPServer):
    """Threads that end with the process; ``most`` connections of one address at once, and four times as many in all, so
    that one machine that keeps connections open does not shut the others out."""

    daemon_threads = True
    request_queue_size = 64
    most = 64

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self._open: Counter[str] = Counter()
        self._guard = threading.Lock()
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._guard:
            full = self._open[client_address[0]] >= self.most or self._open.total() >= 4 * self.most
            if not full:
                self._open[client_address[0]] += 1
        if full:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._guard:
                self._open[client_address[0]] -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A tab that is closed breaks its connections; that is no news."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def listen(handler: type[H], host: str, port: int, names: Iterable[str] = ()) -> LocalServer:
    """A server that is bound and not yet serving; port 0 takes a free one.

    Args:
        handler: a class of its own for this server: the names are kept in it.
        names: host names of this machine that pages are opened under, besides its own; addresses always hold.
    Raises:
        UserError: where nothing can listen there.
    """
    handler.allowed_names = {"localhost", host.lower(), socket.gethostname().lower(), *(name.lower() for name in names)}
    try:
        return LocalServer((host, port), handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"{host}:{port} cannot be listened on ({error}); choose another host= or port=.") from None


class LocalHandler(BaseHTTPRequestHandler, ABC):
    """Answers one connection's requests. A page's server gives ``get``, ``post`` and ``check_token``, which raise Refused."""

    allowed_names: ClassVar[set[str]]
    protocol_version = "HTTP/1.1"
    server_version = "local"
    sys_version = ""
    timeout = 60  # seconds; a connection that says nothing gives its thread free

    def get(self, path: str, query: Query) -> None:
        raise Refused(404, "there is nothing here")

    def post(self, path: str, query: Query) -> None:
        raise Refused(404, "there is nothing here")

    @abstractmethod
    def check_token(self, given: str) -> None:
        """Raises Refused unless ``given`` is a token that may ask."""

    def do_GET(self) -> None:
        self._answer(self.get)

    def do_POST(self) -> None:
        self._answer(self.post)

    def _answer(self, handle: Callable[[str, Query], None]) -> None:
        try:
            parts = urlsplit(self.path)
            query = parse_qs(parts.query)
            self._check_site()
            self.check_token(self.headers.get("X-Token") or (query.get("token") or [""])[0])
            handle(parts.path, query)
        except Refused as refusal:
            # What was not read of the body must not be taken for the next request.
            self.close_connection = True
            self.send(refusal.status, "application/json", json.dumps({"error": str(refusal)}).encode())
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True
        except (ValueError, RecursionError) as error:
            self.close_connection = True
            self.send(400, "application/json", json.dumps({"error": f"not understood: {error}"}).encode())

    def _check_site(self) -> None:
        """Host first: a foreign site that points its own name here (DNS rebinding) gives itself away by it."""
        host = _name_in(self.headers.get("Host", ""))
        if host not in self.allowed_names and not _is_address(host):
            raise Refused(403, "this name is not one of this server")
        origin = self.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != self.headers.get("Host", ""):
            raise Refused(403, "the request comes from another site")

    def body(self) -> Any:
        """The request's JSON. Raises Refused, and ValueError for what is no JSON."""
        if self.headers.get("Content-Type", "").partition(";")[0].strip() != "application/json":
            raise Refused(415, "what is sent is application/json")
        length = self.headers.get("Content-Length", "")
        if not NUMBER.fullmatch(length):
            raise Refused(411, "the body's length is missing")
        if int(length) > MAX_BODY:
            raise Refused(413, f"the body is over {MAX_BODY} bytes")
        return json.loads(self.rfile.read(int(length)))

    def send_json(self, content: Any) -> None:
        self.send(200, "application/json", json.dumps(content, ensure_ascii=False).encode("utf-8", "replace"))

    def send(self, status: int, kind: str, body: bytes, cache: str = "no-store", nonce: str | None = None) -> None:
        """One answer. ``nonce`` is what the page's own script and style carry; nothing else runs."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", cache)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        own = f"'nonce-{nonce}'" if nonce else "'none'"
        self.send_header(
            "Content-Security-Policy",
            f"default-src 'none'; script-src {own}; style-src {own}; img-src 'self' data: blob:; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        )
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a line for each picture would bury what a person should read, and tokens do not belong in logs."""


class Pace:
    """At most ``rate`` requests a second of each address, after a first ``burst``; more are refused with 429."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate, self._burst = rate, float(burst)
        self._left: dict[str, tuple[float, float]] = {}  # address -> what is left, and when that was so
        self._guard = threading.Lock()

    def check(self, address: str) -> None:
        """Count one request. Raises Refused."""
        now = time.monotonic()
        with self._guard:
            left, before = self._left.get(address, (self._burst, now))
            left = min(self._burst, left + (now - before) * self._rate) - 1
            if len(self._left) > 10_000:  # of more addresses than a laboratory has, the memory is bounded
                self._left.clear()
            self._left[address] = (max(left, -1), now)
        if left < 0:
            raise Refused(429, "too many requests; wait a second")


def address_of(host: str, port: int) -> str:
    """``http://...`` as a person opens it who sits at this machine."""
    shown = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}/"


def whole(text: str) -> str:
    """``text`` without halves of characters, which a browser can send and no file can hold."""
    return text.encode("utf-8", "replace").decode()


def _name_in(host: str) -> str:
    """The name in a Host header, without its port: through a tunnel that is another one."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if re.search(r":\d+$", host) else host.lower()


def _is_address(host: str) -> bool:
    """An address cannot be pointed elsewhere, as a name can."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
