"""A headless Chromium for the tests of pages, and requests to the servers of the vote and the review."""

from __future__ import annotations

import http.client
import itertools
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest
from commands import ROOT

from paradiffusion.apps import serving

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
in_browser = pytest.mark.skipif(not CHROMIUM.exists(), reason="needs /usr/bin/chromium")


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def listen(page: Any, wrong: list[str]) -> None:
    """Note in ``wrong`` what a page complains of, and requests that leave this machine."""
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append("a script of a text ran"))
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    here = ("http://127.0.0.1", "blob:", "data:", "file:")
    page.on("request", lambda request: None if request.url.startswith(here) else wrong.append(request.url))


class Served:
    """A server of the vote or the review within the tests' process, and requests to it as somebody with ``token``."""

    def __init__(self, app: Any, token: str) -> None:
        self.server, self.token = serving.Server(app), token
        listener = serving.listen("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, args=([listener],))
        self.thread.start()

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()

    def ask(self, path: str, body: Any = None, method: str | None = None, **headers: Any) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers of an answer; a header given as None is left out."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        sent = {"X-Token": self.token, "Host": f"127.0.0.1:{self.port}"}
        sent |= {"Content-Type": "application/json", "Content-Length": str(len(data))} if data is not None else {}
        connection.putrequest(method or ("GET" if data is None else "POST"), path, skip_host=True)
        for name, value in {**sent, **{name.replace("_", "-"): value for name, value in headers.items()}}.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(data)
        answer = connection.getresponse()
        found = answer.status, answer.read(), {name.title(): value for name, value in answer.headers.items()}
        connection.close()
        return found


class Program:
    """The command line of the vote or the review, as a process that can be killed and started again at its port.

    Attributes:
        urls: what it printed: the first ``addresses`` of them.
    """

    def __init__(self, *arguments: str, addresses: int = 1) -> None:
        self.arguments, self.addresses, self.port = arguments, addresses, 0
        self.urls: list[str] = []
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> Self:
        self.process = subprocess.Popen(
            [sys.executable, *self.arguments, f"port={self.port}"],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        found = (re.search(r"http://127\.0\.0\.1:(\d+)/\S+", line) for line in self.process.stdout)
        printed = list(itertools.islice(filter(None, found), self.addresses))
        assert len(printed) == self.addresses
        self.urls, self.port = [one[0] for one in printed], int(printed[0][1])
        return self

    def end(self, number: int = signal.SIGKILL) -> int:
        """Its exit status, after the signal ``number``; it must not have complained of anything."""
        assert self.process is not None
        self.process.send_signal(number)
        assert self.process.communicate(timeout=20)[1] == ""
        return self.process.returncode

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.end()


def refuses_strangers(served: Served, requests: list[tuple[str, Any]]) -> None:
    """None of these requests is answered without the token, under a foreign name, or from another site's page; a style is
    without the token, but nowhere else."""
    for path, body in requests:
        for headers in ({"X_Token": None}, {"X_Token": "wrong"}, {"X_Token": "\xff"}, {"Origin": "http://evil.example"}):
            status, _, given = served.ask(path, body, **headers)
            assert (status, given["X-Content-Type-Options"]) == (403, "nosniff"), (path, headers)
        for host in ("evil.example:80", "127.0.0.1.evil.example", "", None):
            assert served.ask(path, body, Host=host)[0] == 400, (path, host)
    status, _, given = served.ask("/static/base.css", X_Token=None)
    assert status == 200 and given["Content-Type"].startswith("text/css") and given["Cache-Control"] == "no-store"
    assert served.ask("/static/app.css", Host="evil.example")[0] == 400
    assert served.ask("/static/app.css", Origin="http://evil.example")[0] == 403
    for host in ("localhost:99", "192.168.7.7:8766", "[::1]:8766"):  # through a tunnel, or from the same network
        assert served.ask("/", Host=host)[0] == 200


def refuses_bodies(served: Served, path: str, good: Any, wrong: list[dict[str, Any]]) -> None:
    """What is no JSON, too large or of another kind is refused by its status, and ``good`` with one of ``wrong`` by 400."""
    assert served.ask(path, b"x", Content_Length=str(serving.MAX_BODY + 1))[0] == 413
    many = b"%x\r\n%b\r\n0\r\n\r\n" % (serving.MAX_BODY + 1, b" " * (serving.MAX_BODY + 1))
    assert served.ask(path, many, Content_Length=None, Transfer_Encoding="chunked")[0] == 413
    assert served.ask(path, b"", Content_Length=None)[0] == 400 == served.ask(path, b"", Content_Length="-5")[0]
    assert served.ask(path, good, Content_Type="text/plain")[0] == 415  # what another site's form could send
    for body in (b"", b"[", b"[]", b"[" * 20_000, b"\xff\xfe", b"null", b'"x"'):
        assert served.ask(path, body)[0] == 400, body[:20]
    for changes in wrong:
        assert served.ask(path, {**good, **changes})[0] == 400, changes


def serves_no_files(served: Served, paths: list[str]) -> None:
    """None of these paths leads to a file."""
    for path in paths:
        status, body, _ = served.ask(path)
        assert status == 404 and b"error" in body, path
