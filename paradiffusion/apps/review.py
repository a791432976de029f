"""The review app: candidates shown one by one in a local web page, every decision on disk before the next picture.

It listens on 127.0.0.1 unless told otherwise. Images are named by candidate number, never by path.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from paradiffusion.apps.serving import MAX_BODY, address_of, json_response, local_app, page, serve, taking_json, whole, write_private
from paradiffusion.curation.choosing.candidates import Candidate, Candidates
from paradiffusion.curation.choosing.decisions import DECISIONS, FIELDS, VERDICTS, DecisionLog
from paradiffusion.errors import UserError

MAX_TEXT: Final = MAX_BODY - 2048
"""Bytes of one text as JSON; what else an event holds takes the rest of a body. About 10,000 English words."""
WORDS: Final = (50, 100)
"""The band of words that 83 % of ParaImage-Small's descriptions lie in."""
_NUMBER: Final = re.compile(r"[0-9]{1,9}")
_TYPES: Final = {**dict.fromkeys(("jpg", "jpeg", "jfif"), "image/jpeg"), "png": "image/png", "webp": "image/webp"}


@dataclass
class Review:
    """One review: the candidates, the log, the token, and the name of who reviews unless the page says otherwise."""

    candidates: Candidates
    log: DecisionLog
    token: str
    reviewer: str
    name: str

    def decide(self, body: Any) -> dict[str, Any]:
        """Record the event in ``body`` and answer what it met. Raises HTTPException for anything that is no event."""
        event = _checked(body)
        candidate = self.candidates.by_sample.get(event["sample"])
        if candidate is None:
            raise HTTPException(404, "that sample is not among the candidates")
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
        write_private(path, token)
    return Review(candidates, DecisionLog(work / DECISIONS), token, reviewer.strip(), work.absolute().name)


def review_app(review: Review, hosts: tuple[str, ...] = ()) -> Starlette:
    """The app of ``review``; ``hosts`` as ``local_app`` has them."""

    def owner(given: str) -> str | None:
        right = secrets.compare_digest(given.encode("utf-8", "replace"), review.token.encode())
        return review.reviewer if right else None

    def asked_for(request: Request) -> Candidate:
        number = request.path_params["number"]
        if not _NUMBER.fullmatch(number) or int(number) >= len(review.candidates.all):
            raise HTTPException(404, "there is no such candidate")
        return review.candidates.all[int(number)]

    def show(request: Request) -> Response:
        settings = {"name": review.name, "reviewer": review.reviewer, "words": WORDS, "most": MAX_TEXT}
        return page("review", f"{review.name}: review", review.token, **settings)

    def state(request: Request) -> Response:
        since = request.query_params.get("since", "0")
        if not _NUMBER.fullmatch(since):
            raise HTTPException(400, "since is a number")
        found = review.state(int(since))
        if request.query_params.get("listing") != found["listing"]:
            found["samples"] = [candidate.sample for candidate in review.candidates.all]
        return json_response(found)

    def describe(request: Request) -> Response:
        return json_response(review.candidates.describe(asked_for(request)))

    def image(request: Request) -> Response:
        candidate = asked_for(request)
        if request.query_params.get("sample", candidate.sample) != candidate.sample:
            raise HTTPException(409, "the candidates were chosen anew; load the page again")
        sample = review.candidates.read(candidate)
        if sample is None:
            raise HTTPException(410, "the shard cannot be read")
        return Response(sample.image, 200, {"Cache-Control": "private, max-age=3600"}, _TYPES[sample.extension])

    def decide(request: Request, body: Any) -> dict[str, Any]:
        try:
            return review.decide(body)
        except OSError as error:
            raise HTTPException(507, f"the decision could not be written ({error.strerror}); make room") from None

    routes = [
        Route("/", show), Route("/api/state", state), Route("/api/candidate/{number}", describe),
        Route("/image/{number}", image), Route("/api/decision", taking_json(decide), methods=["POST"]),
    ]  # fmt: skip
    return local_app(routes, owner, hosts)


def serve_review(work: Path, reviewer: str, host: str, port: int) -> None:
    """Serve the review page of the candidates in ``work`` until Ctrl-C or SIGTERM. Raises UserError."""
    review = open_review(work, reviewer)
    count = len(review.candidates.all)
    serve(
        review_app(review, (host,)), host, port,
        lambda port: [f"{count} candidates; open {address_of(host, port)}?token={review.token}"],
        "whoever reads the address can decide too",
    )  # fmt: skip
    review.log.close()
    print(f"ended; every decision is in {work / DECISIONS}. The same command goes on, action=export writes the shards.")


def _size(text: str) -> int:
    """Bytes of ``text`` as the page sends it."""
    return len(json.dumps(text, ensure_ascii=False).encode("utf-8", "replace"))


def _checked(body: Any) -> dict[str, Any]:
    """The event in a request's ``body``, with nothing in it but what an event has. Raises HTTPException."""
    if not isinstance(body, dict) or not isinstance(body.get("set"), dict) or not body["set"]:
        raise HTTPException(400, "a decision is an object with event, sample, reviewer, at, base and set")
    for name, most in (("event", 80), ("sample", 40), ("reviewer", 60)):
        if not isinstance(body.get(name), str) or not 1 <= len(body[name].strip()) <= most:
            raise HTTPException(400, f"{name} is a text of 1 to {most} characters")
    for name in ("at", "base"):
        if type(body.get(name)) is not int or not 0 <= body[name] < 1 << 53:
            raise HTTPException(400, f"{name} is a whole number")
    changes = body["set"]
    for name, value in changes.items():
        if name not in FIELDS or not (value is None or isinstance(value, str)) or _size(value or "") > MAX_TEXT:
            raise HTTPException(400, f"set has decision, caption or note, each a text of at most {MAX_TEXT} bytes")
    if "decision" in changes and changes["decision"] not in VERDICTS:
        raise HTTPException(400, "a decision is keep, drop or null")
    kept = {name: body[name] for name in ("event", "sample", "at", "base")} | {"event": whole(body["event"])}
    changes = {name: value and whole(value) for name, value in changes.items()}
    return {**kept, "reviewer": whole(body["reviewer"].strip()), "set": changes}
