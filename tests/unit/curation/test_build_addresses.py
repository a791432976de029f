"""Addresses as lists of the web have them, and sites that answer with something else than a picture."""

from __future__ import annotations

import csv
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import encoded, picture

from paradiffusion.curation.building import places
from paradiffusion.curation.building.build import build
from paradiffusion.curation.building.build_options import BuildOptions
from paradiffusion.curation.building.places import Dropped, FetchLimits, fetch

PICTURE = encoded(picture(1, 72, 64))
LIMITS = FetchLimits(1 << 20, timeout=5, retries=1)


class _Site(BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        again = self.asked.count(self.path) > 1
        path = self.path.partition("?")[0]
        if path in ("/busy", "/date") and not again:
            self.send_response(429)
            self.send_header("Retry-After", "7" if path == "/busy" else "Wed, 21 Oct 2015 07:28:00 GMT")
            self.end_headers()
            return
        if path == "/agent" and not self.headers.get("User-Agent", "").startswith("paradiffusion"):
            self.send_error(403)
            return
        data = {"/page.jpg": b"<!DOCTYPE html><html>Gone", "/nothing.jpg": b""}.get(path, PICTURE)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    monkeypatch.setenv("no_proxy", "*")
    handler = type("Site", (_Site,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.asked  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("address", "sent"),
    [
        ("/große Katze.jpg", "/gro%C3%9Fe%20Katze.jpg"),
        ("/猫.jpg?größe=5&x=a b", "/%E7%8C%AB.jpg?gr%C3%B6%C3%9Fe=5&x=a%20b"),
        ("/already%20sent.jpg?a=%C3%9F", "/already%20sent.jpg?a=%C3%9F"),
        ("/both%20 ways.jpg", "/both%20%20ways.jpg"),
    ],
)
def test_letters_of_all_alphabets(address: str, sent: str, site: tuple[str, list[str]]) -> None:
    assert fetch(site[0] + address, LIMITS) == PICTURE and site[1] == [sent]


@pytest.mark.parametrize(("path", "pause"), [("/busy", 7.0), ("/date", 1.0)])
def test_a_busy_site_is_given_the_time_that_it_asks_for(
    path: str, pause: float, site: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(places, "sleep", pauses.append)
    assert fetch(site[0] + path, LIMITS) == PICTURE and pauses == [pause]
    site[1].clear()
    with pytest.raises(Dropped, match="status 429"):
        fetch(site[0] + path, FetchLimits(1 << 20, timeout=5, retries=0))


def test_answers_that_are_no_pictures_are_told_apart(site: tuple[str, list[str]], tmp_path: Path) -> None:
    with open(tmp_path / "t.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["url", "caption"])
        writer.writerows([f"{site[0]}/{name}", "some words"] for name in ("agent", "page.jpg", "nothing.jpg"))
    report = build(BuildOptions(input=str(tmp_path / "t.csv"), output=str(tmp_path / "out"), processes=1, timeout=5))
    assert report.kept == 1 and report.dropped == {"empty file": 1, "not an image": 1}
    assert report.examples["not an image"] == [f"t.csv line 3 ({site[0]}/page.jpg): a web page"]
