"""A small server of the OpenAI chat protocol on this machine, which fails when told to."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

NAME = "tiny-vlm"
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey")
SENTENCES = (
    "A {} cup made of {} glass stands {}.", "Next to it, a {} lamp with a {} shade leans {}.", "Somebody has left a {} chair and its {} cushion {}.",
    "There is one {} bottle, with {} corks, {}.", "Its neighbour is a {} book whose {} spine faces us {}.", "The {} clock shows noon on a {} dial {}.",
    "Three {} baskets hold {} apples {}.", "Under all that, {} plates and {} bowls wait {}.",
)  # fmt: skip
PLACES = ("on the left", "on the right", "in the middle", "near the window", "behind the table", "at the top", "under a shelf")


def paragraph(seed: bytes) -> str:
    """A caption of eight sentences, about a hundred words, a function of ``seed``."""
    digest = hashlib.sha512(seed).digest()
    said = []
    for number, sentence in enumerate(SENTENCES):
        a, b, c = digest[3 * number : 3 * number + 3]
        said.append(sentence.format(COLOURS[a % 8], COLOURS[b % 8], PLACES[c % 7] + " of the room"))
    return " ".join(said)


@dataclass
class Asked:
    """A request as it came."""

    prompt: str
    image: bytes
    body: dict[str, Any]
    headers: dict[str, str]

    def size(self) -> tuple[int, int]:
        with Image.open(io.BytesIO(self.image)) as image:
            return image.size


@dataclass
class ChatServer:
    """What the server does, and what it was asked.

    Attributes:
        faults: by the number of the request, from 0: (status, body, seconds to wait) instead of an answer.
        answer: text and finish reason of a request.
        retry_after: the header of that name with a fault.
        key: the key that it asks for, if any.
    """

    url: str = ""
    models: list[str] = field(default_factory=lambda: [NAME])
    faults: dict[int, tuple[int, bytes, float]] = field(default_factory=dict)
    answer: Callable[[Asked], tuple[str | None, str]] = lambda asked: (paragraph(asked.image + asked.prompt.encode()), "stop")
    retry_after: str = "0"
    key: str | None = None
    asked: list[Asked] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def chat_server() -> Iterator[ChatServer]:
    """Run one on a free port."""
    state = ChatServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def reply(self, status: int, content: bytes, **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(content)

        def refused(self) -> bool:
            if state.key is None or self.headers.get("Authorization") == f"Bearer {state.key}":
                return False
            self.reply(401, json.dumps({"error": {"message": "Incorrect API key"}}).encode())
            return True

        def do_GET(self) -> None:
            if self.refused():
                return
            if self.path != "/v1/models":
                self.reply(404, b"{}")
                return
            self.reply(200, json.dumps({"data": [{"id": name} for name in state.models]}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.refused():
                return
            if self.path != "/v1/chat/completions" or body["model"] not in state.models:
                self.reply(404, json.dumps({"error": {"message": f"no model {body['model']}"}}).encode())
                return
            picture, text = body["messages"][0]["content"]
            image = base64.b64decode(picture["image_url"]["url"].partition("base64,")[2])
            asked = Asked(text["text"], image, body, dict(self.headers))
            with state.lock:
                number = len(state.asked)
                state.asked.append(asked)
                state.at_once += 1
                state.most_at_once = max(state.at_once, state.most_at_once)
            try:
                if number in state.faults:
                    status, content, wait = state.faults[number]
                    time.sleep(wait)
                    self.reply(status, content, Retry_After=state.retry_after, **({"Location": "/v1/elsewhere"} if status == 307 else {}))
                    return
                said, reason = state.answer(asked)
                choice = {"message": {"role": "assistant", "content": said}, "finish_reason": reason}
                self.reply(200, json.dumps({"choices": [choice], "usage": {"completion_tokens": len((said or "").split())}}).encode())
            except (BrokenPipeError, ConnectionResetError):  # the captioner has gone
                pass
            finally:
                with state.lock:
                    state.at_once -= 1

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
