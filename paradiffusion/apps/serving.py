"""Local web server of the vote and review apps: checks of requests, security headers, and uvicorn."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import logging
import re
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from paradiffusion.atomic import atomic_file
from paradiffusion.errors import UserError
from paradiffusion.pages import ROOT, render

MAX_BODY: Final = 1 << 16
MAX_CONNECTIONS: Final = 256
PATIENCE = 30  # seconds, with a connection that says nothing and with a body that does not come
_HEADERS: Final = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


def local_app(
    routes: Sequence[Route], owner: Callable[[str], str | None], hosts: Iterable[str] = (), rates: Rates | None = None
) -> Starlette:
    """An app for a person's own machine or a laboratory's network.

    Args:
        routes: what is answered to who has a token, in X-Token or ?token=. Styles and scripts are given to everybody.
        owner: whose token a text is, which ``request.state.owner`` then says; None where it is nobody's.
        hosts: names of this machine that pages are opened under, besides its own; addresses always hold.
        rates: how many requests of one address are answered.
    """

    def check_token(request: Request) -> None:
        request.state.owner = owner(request.headers.get("x-token") or request.query_params.get("token", ""))
        if request.state.owner is None:
            raise HTTPException(403, "the token is missing or wrong: open the address that you were given")

    checks = [Middleware(_checked, check=check) for check in (check_origin, *([rates.check] if rates else []))]
    static = [
        Route("/static/base.css", lambda request: FileResponse(ROOT / "templates" / "base.css")),
        Mount("/static", StaticFiles(directory=Path(__file__).parent / "static")),
    ]
    own = Mount("/", routes=routes, middleware=[Middleware(_checked, check=check_token)])
    return Starlette(
        routes=[Mount("/", routes=[*static, own], middleware=checks, max_body_size=MAX_BODY)],
        middleware=[Middleware(_with_headers), Middleware(Hosts, allowed_hosts=names_of(hosts), www_redirect=False)],
        exception_handlers={HTTPException: _refusal},
    )


def names_of(hosts: Iterable[str] = ()) -> list[str]:
    """The names that a page is opened under: this machine's own and ``hosts``."""
    # To TrustedHostMiddleware a star is a pattern; no host is called so.
    return ["localhost", socket.gethostname(), *(name for name in hosts if "*" not in name)]


class Hosts(TrustedHostMiddleware):
    """A Host that is one of ours: a foreign site that points its own name here (DNS rebinding) gives itself away by it. An
    address cannot be pointed elsewhere, and always holds; through a tunnel the port is another one."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = re.sub(r":\d+$", "", Headers(scope=scope).get("host", "")).strip("[]")
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return await super().__call__(scope, receive, send)
        await self.app(scope, receive, send)


def check_origin(request: Request) -> None:
    """Raises HTTPException for a request from another site's page."""
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
        raise HTTPException(403, "the request comes from another site")


class Rates:
    """At most ``rate`` requests a second of each address, after a first ``burst``; more are refused with 429."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate, self._burst = rate, float(burst)
        self._left: dict[str, tuple[float, float]] = {}  # address -> what is left, and when that was so

    def check(self, request: Request) -> None:
        """Count one request; called in the event loop alone. Raises HTTPException."""
        address, now = request.client.host if request.client else "", time.monotonic()
        left, before = self._left.get(address, (self._burst, now))
        left = min(self._burst, left + (now - before) * self._rate) - 1
        if len(self._left) > 10_000:  # of more addresses than a laboratory has, the memory is bounded
            self._left.clear()
        self._left[address] = (max(left, -1), now)
        if left < 0:
            raise HTTPException(429, "too many requests; wait a second")


def _checked(app: ASGIApp, check: Callable[[Request], None]) -> ASGIApp:
    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        check(Request(scope))
        await app(scope, receive, send)

    return call


def _with_headers(app: ASGIApp) -> ASGIApp:
    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                for name, value in _HEADERS.items():
                    MutableHeaders(scope=message).setdefault(name, value)
            await send(message)

        await app(scope, receive, sending)

    return call


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return json_response({"error": error.detail}, error.status_code)


def json_response(content: Any, status: int = 200) -> Response:
    """``content`` as JSON; halves of characters, which a caption of the web can hold, become question marks."""
    data = json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")
    return Response(data, status, media_type="application/json")


def whole(text: str) -> str:
    """``text`` without halves of characters, which a browser can send and no file can hold."""
    return text.encode("utf-8", "replace").decode()


def page(app: str, title: str, token: str, /, **settings: Any) -> Response:
    """The page of templates/``app``.html, whose script finds ``settings`` and an ``id``, which keeps what waits in the browser
    apart from that of other tokens."""
    settings["id"] = hashlib.blake2b(token.encode(), digest_size=8).hexdigest()
    text = render(f"apps/templates/{app}.html", app=app, title=title, settings=settings)
    return HTMLResponse(text.encode("utf-8", "replace"))


def taking_json(act: Callable[[Request, Any], Any]) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that answers the JSON which ``act`` makes of the request's, in a thread: it waits for the disk."""

    async def endpoint(request: Request) -> Response:
        # Another site's form cannot send this type.
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise HTTPException(415, "what is sent is application/json")
        try:
            body = await asyncio.wait_for(request.json(), PATIENCE)
        except (ValueError, RecursionError, ClientDisconnect, TimeoutError) as error:
            raise HTTPException(400, f"not understood: {error}") from None
        return json_response(await run_in_threadpool(act, request, body))

    return endpoint


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. Raises UserError where nothing can listen there."""
    try:
        if ":" in host:
            dual = socket.has_dualstack_ipv6()
            return socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=dual)
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"{host}:{port} cannot be listened on ({error}); choose another host= or port=.") from None


def address_of(host: str, port: int) -> str:
    """``http://...`` as a person opens it who sits at this machine."""
    shown = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}/"


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read."""
    with atomic_file(path) as partial:
        partial.unlink(missing_ok=True)
        partial.touch(0o600, exist_ok=False)
        partial.write_text(text, encoding="utf-8")


class _Protocol(H11Protocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Uvicorn's patience begins after a first answer; a connection that never asks must not keep its place either."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:  # half of a request's head, for which uvicorn waits for ever
            self._wait()

    def _wait(self) -> None:
        if self.timeout_keep_alive_task is None:
            later = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
            self.timeout_keep_alive_task = later


class Server(uvicorn.Server):
    """Uvicorn as these apps need it: it says nothing but errors, since tokens do not belong in logs."""

    def __init__(self, app: Starlette) -> None:
        config = uvicorn.Config(
            app, http=_Protocol, ws="none", lifespan="off", loop="asyncio", log_config=None, log_level="error", access_log=False,
            server_header=False, proxy_headers=False, limit_concurrency=MAX_CONNECTIONS, timeout_keep_alive=PATIENCE,
            timeout_graceful_shutdown=2,
        )  # fmt: skip
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The end: what is cut off in its middle, such as half a request, is no error."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().handle_exit(sig, frame)


def serve(app: Starlette, host: str, port: int, lines: Callable[[int], Iterable[str]], risk: str) -> None:
    """Answer until Ctrl-C or SIGTERM; before that, print ``lines(port)`` and, where other machines reach it, the ``risk``. UserError where
    nothing can listen there."""
    listener, server = listen(host, port), Server(app)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)  # uvicorn's own begins later, and raises the signal anew at the end
    local = host in ("127.0.0.1", "localhost", "::1")
    warning = [] if local else [f"other machines reach this page, unencrypted: {risk}."]
    print(*lines(listener.getsockname()[1]), *warning, sep="\n", flush=True)
    server.run(sockets=[listener])
