"""The review server: candidates shown one by one in a local web page, every decision on disk before the next picture.

Only standard library. It listens on 127.0.0.1 unless told otherwise; each request needs the random token of the address
that is printed, and a Host that no other web site can give. Images are named by candidate number, never by path.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final

from paradiffusion.apps.serving import MAX_BODY, NUMBER, LocalHandler, LocalServer, Query, Refused, listen, whole
from paradiffusion.curation.choosing.candidates import Candidate, Candidates
from paradiffusion.curation.choosing.decisions import DECISIONS, FIELDS, VERDICTS, DecisionLog
from paradiffusion.errors import UserError
from paradiffusion.pages import render

__all__ = ["MAX_BODY", "Review", "make_server", "open_review"]

MAX_TEXT: Final = MAX_BODY - 2048
"""Bytes of one text as JSON; what else an event holds takes the rest of a body. About 10,000 English words."""
WORDS: Final = (50, 100)
"""The band of words that 83 % of ParaImage-Small's descriptions lie in."""
_TYPES: Final = {"jpg": "image/jpeg", "jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp"}


@dataclass
class Review:
    """One review: the candidates, the log, the token, and the name of who reviews unless the page says otherwise."""

    candidates: Candidates
    log: DecisionLog
    token: str
    reviewer: str
    name: str

    def decide(self, body: Any) -> dict[str, Any]:
        """Record the event in ``body`` and answer what it met. Raises Refused for anything that is no event."""
        event = _checked(body)
        candidate = self.candidates.by_sample.get(event["sample"])
        if candidate is None:
            raise Refused(404, "that sample is not among the candidates")
        base = event.pop("base")
        conflicts = self.log.conflicts(event["sample"], event["reviewer"], event["set"], base)
        self.log.record({**event, "shard": candidate.shard, "key": candidate.key})
        revision, by = self.log.of(event["sample"])
        return {"revision": revision, "by": by, "conflicts": conflicts}

    def state(self, since: int) -> dict[str, Any]:
        """What changed after revision ``since``, and what names the ``listing`` of the candidates."""
        revision, changed = self.log.since(since)
        return {"revision": revision, "changed": changed, "listing": self.listing}

    @cached_property
    def listing(self) -> str:
        """A hash of the candidates and their order: a page that knows another list numbers other pictures."""
        return hashlib.blake2b(" ".join(self.candidates.by_sample).encode(), digest_size=8).hexdigest()


def open_review(work: Path, reviewer: str) -> Review:
    """The review of the candidates in ``work``. Raises UserError when there are none, or another server has them open."""
    if not 1 <= len(reviewer.strip()) <= 60:
        raise UserError(f"reviewer={reviewer!r} is no name; give one of 1 to 60 characters.")
    candidates = Candidates.load(work)
    # Kept, so that a page that is open goes on when the server is started again.
    path = work / ".review_token"
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        token = ""
    if len(token) < 20:
        token = secrets.token_urlsafe(24)
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(token)
    return Review(candidates, DecisionLog(work / DECISIONS), token, reviewer.strip(), work.absolute().name)


def make_server(review: Review, host: str, port: int) -> LocalServer:
    """A server of ``review``, bound and not yet serving; port 0 takes a free one. Raises UserError."""

    class Own(_Handler):
        pass

    Own.review = review
    return listen(Own, host, port)


class _Handler(LocalHandler):
    review: ClassVar[Review]
    server_version = "review"

    def check_token(self, given: str) -> None:
        if not secrets.compare_digest(given.encode("utf-8", "replace"), self.review.token.encode()):
            raise Refused(403, "the token is missing or wrong: open the address that the server printed")

    def get(self, path: str, query: Query) -> None:
        if path == "/":
            nonce = secrets.token_urlsafe(16)
            identity = hashlib.blake2b(self.review.token.encode(), digest_size=8).hexdigest()
            # The identity keeps what waits in the browser apart from that of other reviews at the same address.
            settings = {
                "name": self.review.name, "id": identity, "reviewer": self.review.reviewer, "words": WORDS, "most": MAX_TEXT,
            }  # fmt: skip
            title = f"{self.review.name}: review"
            text = render("apps/templates/review.html", nonce=nonce, title=title, settings=settings)
            self.send(200, "text/html; charset=utf-8", text.encode(), nonce=nonce)
        elif path == "/api/state":
            since = (query.get("since") or ["0"])[0]
            if not NUMBER.fullmatch(since):
                raise Refused(400, "since is a number")
            state = self.review.state(int(since))
            if (query.get("listing") or [""])[0] != state["listing"]:
                state["samples"] = [candidate.sample for candidate in self.review.candidates.all]
            self.send_json(state)
        elif path.startswith("/api/candidate/"):
            candidate = self._candidate(path.removeprefix("/api/candidate/"))
            self.send_json(self.review.candidates.describe(candidate))
        elif path.startswith("/image/"):
            candidate = self._candidate(path.removeprefix("/image/"))
            if (query.get("sample") or [candidate.sample])[0] != candidate.sample:
                raise Refused(409, "the candidates were chosen anew; load the page again")
            sample = self.review.candidates.read(candidate)
            if sample is None:
                raise Refused(410, "the shard cannot be read")
            self.send(200, _TYPES[sample.extension], sample.image, cache="private, max-age=3600")
        else:
            raise Refused(404, "there is nothing here")

    def post(self, path: str, query: Query) -> None:
        if path != "/api/decision":
            raise Refused(404, "there is nothing here")
        body = self.body()
        try:
            answer = self.review.decide(body)
        except OSError as error:
            raise Refused(507, f"the decision could not be written ({error.strerror}); make room") from None
        self.send_json(answer)

    def _candidate(self, text: str) -> Candidate:
        if not NUMBER.fullmatch(text) or int(text) >= len(self.review.candidates.all):
            raise Refused(404, "there is no such candidate")
        return self.review.candidates.all[int(text)]


def _size(text: str) -> int:
    """Bytes of ``text`` as the page sends it."""
    return len(json.dumps(text, ensure_ascii=False).encode("utf-8", "replace"))


def _checked(body: Any) -> dict[str, Any]:
    """The event in a request's ``body``, with nothing in it but what an event has. Raises Refused."""
    if not isinstance(body, dict) or not isinstance(body.get("set"), dict) or not body["set"]:
        raise Refused(400, "a decision is an object with event, sample, reviewer, at, base and set")
    for name, most in (("event", 80), ("sample", 40), ("reviewer", 60)):
        if not isinstance(body.get(name), str) or not 1 <= len(body[name].strip()) <= most:
            raise Refused(400, f"{name} is a text of 1 to {most} characters")
    for name in ("at", "base"):
        if type(body.get(name)) is not int or not 0 <= body[name] < 1 << 53:
            raise Refused(400, f"{name} is a whole number")
    changes = body["set"]
    for name, value in changes.items():
        if name not in FIELDS or not (value is None or isinstance(value, str)) or _size(value or "") > MAX_TEXT:
            raise Refused(400, f"set has decision, caption or note, each a text of at most {MAX_TEXT} bytes")
    if "decision" in changes and changes["decision"] not in VERDICTS:
        raise Refused(400, "a decision is keep, drop or null")
    kept = {name: body[name] for name in ("event", "sample", "at", "base")} | {"event": whole(body["event"])}
    changes = {name: value and whole(value) for name, value in changes.items()}
    return {**kept, "reviewer": whole(body["reviewer"].strip()), "set": changes}
