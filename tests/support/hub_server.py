"""A hub on this machine, as far as huggingface_hub's client asks for it to push and to fetch a repository."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_tiny"


@dataclass
class Hub:
    """The commits of each repository, oldest first, as file contents by name.

    Attributes:
        fault: the status and X-Error-Code that everything is answered with, if any.
        asked: methods and paths, as they came.
    """

    url: str = ""
    commits: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)
    fault: tuple[int, str] | None = None
    asked: list[str] = field(default_factory=list)

    def sha(self, repository: str, number: int = -1) -> str:
        count = range(1, len(self.commits[repository]) + 1)[number]
        return hashlib.sha1(f"{repository} {count}".encode()).hexdigest()

    def files(self, repository: str, revision: str) -> dict[str, bytes] | None:
        found = self.commits[repository]
        shas = [self.sha(repository, number) for number in range(len(found))]
        return found[-1] if revision == "main" else found[shas.index(revision)] if revision in shas else None


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.read()
            if hub.fault or self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.refuse(*hub.fault or (401, ""))
            path = urlsplit(self.path).path
            if path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            if path == "/api/repos/create":
                wanted = json.loads(body)
                name = f"{wanted['organization']}/{wanted['name']}"
                is_new = name not in hub.commits
                hub.commits.setdefault(name, [{}])
                return self.answer({"url": f"{hub.url}/{name}", "id": name}, 200 if is_new else 409)
            user, repository, what = path.removeprefix("/api/models/").split("/")[:3]
            name = f"{user}/{repository}"
            if what == "preupload":
                files = json.loads(body)["files"]
                return self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})  # fmt: skip
            files = dict(hub.commits[name][-1])
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "deletedFile":
                    del files[value["path"]]
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
            hub.commits[name].append(files)
            self.answer({"commitUrl": f"{hub.url}/{name}/commit/{hub.sha(name)}", "commitOid": hub.sha(name)})

        def do_GET(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            parts = parts[2:] if parts[0] == "api" else parts
            name, (what, revision, *rest) = "/".join(parts[:2]), parts[2:] or ("revision", "main")
            if hub.fault or name not in hub.commits:
                return self.refuse(*hub.fault or (401, "RepoNotFound"))
            files = hub.files(name, revision)
            if files is None:
                return self.refuse(404, "RevisionNotFound")
            sha = hub.sha(name) if revision == "main" else revision
            if what == "revision":
                return self.answer({"id": name, "sha": sha, "siblings": []})
            if what == "tree":
                rows = [{"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()} for path, data in files.items()]  # fmt: skip
                return self.answer(rows)
            data = files["/".join(rest)]
            self.send(200, data, {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

        do_HEAD = do_GET

        def read(self) -> bytes:
            hub.asked.append(f"{self.command} {self.path}")
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            whole = b""
            while size := int(self.rfile.readline(), 16):
                whole += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return whole

        def answer(self, values: object, status: int = 200) -> None:
            self.send(status, json.dumps(values).encode(), {"Content-Type": "application/json"})

        def refuse(self, status: int, code: str) -> None:
            self.send(status, b'{"error": "refused"}', {"X-Error-Code": code, "Content-Type": "application/json"})

        def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A running hub without repositories."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_at(patch: pytest.MonkeyPatch, url: str, cache: object, token: str | None = TOKEN, offline: bool = False) -> None:
    """Let the client of this process talk to ``url``, which it has read from its environment already."""
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    patch.setattr("huggingface_hub.constants.ENDPOINT", url)
    patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}")  # fmt: skip
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    patch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", f"{cache}/no_token")
    patch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        patch.setenv("HF_TOKEN", token)
