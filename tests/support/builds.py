"""Shards built within the tests' own process, from tables, archives, folders and a site of pictures on this machine."""

from __future__ import annotations

import csv
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from data_fixtures import encoded, picture

from paradiffusion.curation.building.build import Report, build
from paradiffusion.curation.building.build_options import BuildOptions
from paradiffusion.data.index import load_index, read_sample
from paradiffusion.data.shards import RawSample, expand_shards


def image(number: int) -> bytes:
    """A PNG of noise, large enough to be kept."""
    return encoded(picture(number, 72, 64))


def make(source: Path | str, output: Path, **options: Any) -> Report:
    return build(BuildOptions(input=str(source), output=str(output), **{"processes": 1, **options}))


def samples(folder: Path) -> dict[str, RawSample]:
    """All samples below a folder by key."""
    index = load_index(expand_shards(folder))
    return {index.key(row): read_sample(index, row) for row in range(len(index))}


def captions(folder: Path) -> dict[str, dict[str, str]]:
    return {key: sample.meta["captions"] for key, sample in samples(folder).items()}


def write_captioned(folder: Path, *names: str) -> Path:
    """A folder of pictures a.png, each with "words of a" in a file beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / f"{name}.png").write_bytes(image(number))
        (folder / f"{name}.txt").write_text(f"words of {name}")
    return folder


def write_table(path: Path, rows: list[dict[str, Any]], encoding: str = "utf-8") -> Path:
    """One of the kinds of tables, by the name."""
    if path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="", encoding=encoding) as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding=encoding)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding=encoding)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


class _Site(BaseHTTPRequestHandler):
    """What goes wrong on the web, by the path; any other path is a picture of its own."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        path, again = self.path.partition("?")[0], self.asked.count(self.path) > 1
        away = {"/away": "ftp://127.0.0.1/x.png", "/round": "/round", "/moved": "/5.png"}
        failing = {"/gone.png": 404} | ({} if again else {"/flaky.png": 503, "/busy": 429, "/date": 429})
        if path == "/agent" and not self.headers.get("User-Agent", "").startswith("paradiffusion"):
            failing[path] = 403
        bodies = {"/page.jpg": b"<!DOCTYPE html><html>Gone", "/nothing.jpg": b"", "/huge": b"x" * (3 << 20)}
        data = bodies.get(path, image(sum(path.encode())))
        headers = {
            "/busy": {"Retry-After": "7"}, "/date": {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"},
            "/no-thanks": {"X-Robots-Tag": "noai, noimageai"},
        }.get(path, {})  # fmt: skip
        headers |= {"Location": away[path]} if path in away else {}
        self.send_response(302 if path in away else failing.get(path, 200))
        for name, value in {"Content-Length": str(len(data) + 100 * (path == "/short")), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def pictures_site() -> Iterator[tuple[str, list[str]]]:
    """The site's address, and the paths that it was asked for."""
    handler = type("Site", (_Site,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.asked  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
