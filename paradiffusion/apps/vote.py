"""The vote app: each rater's pairs, one by one, and nothing that says which picture is whose."""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import math
import secrets
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from paradiffusion.apps.serving import Rates, address_of, local_app, page, serve, taking_json, whole, write_private
from paradiffusion.data.images import BadImage, decode
from paradiffusion.evaluation.votes.vote_store import SIDES, Refusal, Store, Vote
from paradiffusion.evaluation.votes.vote_study import Study, Task, read_picture

TOKENS: Final = ".tokens.json"
MAX_COMMENT: Final = 2000
LEFT, RIGHT = 0, 1


@dataclass(frozen=True)
class Keys:
    """What may be asked with: a token for each rater, and the secret that pictures' and tasks' public names come from."""

    tokens: dict[str, str]
    secret: bytes

    def rater(self, given: str) -> str | None:
        """Whose token ``given`` is."""
        data = given.encode("utf-8", "replace")
        found = [r for r, token in self.tokens.items() if hmac.compare_digest(data, token.encode())]
        return found[0] if found else None


def open_keys(study: Study) -> Keys:
    """The study's keys, made at the first time; a page that is open goes on when the server is started again."""
    path = study.folder / TOKENS
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        keys = Keys({rater: str(record["raters"][rater]) for rater in study.tasks}, bytes.fromhex(record["secret"]))
        if all(len(token) >= 20 for token in keys.tokens.values()) and len(keys.secret) >= 16:
            return keys
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    keys = Keys({rater: secrets.token_urlsafe(24) for rater in study.tasks}, secrets.token_bytes(32))
    record = {"secret": keys.secret.hex(), "raters": keys.tokens}
    write_private(path, json.dumps(record, ensure_ascii=False, indent=1))
    return keys


class Voting:
    """A study that is being voted on. Its methods raise HTTPException for what is refused."""

    def __init__(self, study: Study, store: Store, keys: Keys) -> None:
        self.study, self.store, self.keys = study, store, keys
        self._shown = {rater: study.shown(rater) for rater in study.tasks}
        # Under the random names that a rater's browser gets; another's are not found.
        own = [(rater, task) for rater, tasks in self._shown.items() for task in tasks]
        self._tasks = {(rater, self.name_of(rater, task)): task for rater, task in own}
        self._pictures = {(r, self.name_of(r, task, side)): (task, side) for r, task in own for side in (LEFT, RIGHT)}

    def name_of(self, rater: str, task: Task, side: int | None = None) -> str:
        """The random name of a task, or of one of its pictures, that this rater's browser gets."""
        text = json.dumps([rater, task.key, side])
        return hmac.new(self.keys.secret, text.encode(), hashlib.sha256).hexdigest()[:32]

    def state(self, rater: str, later: frozenset[str] = frozenset()) -> dict[str, Any]:
        """What the rater's page shows: the first task that is not finished, and how far they are; ``later`` are names of tasks that are
        passed over, since a picture could not be shown."""
        tasks, finished = self._shown[rater], self.store.finished(rater)
        rest = [task for task in tasks if task.key not in finished]
        ahead = [task for task in rest if self.name_of(rater, task) not in later] if later else rest
        state: dict[str, Any] = {"done": len(tasks) - len(rest), "total": len(tasks), "later": len(rest) - len(ahead)}
        if ahead:
            task = ahead[0]
            state["round"], state["rounds"] = task.round + 1, tasks[-1].round + 1
            state["task"] = self._task(rater, task)
            state["next"] = [self.name_of(rater, task, side) for task in ahead[1:2] for side in (LEFT, RIGHT)]
        return state

    def _task(self, rater: str, task: Task) -> dict[str, Any]:
        questions = self.study.asked(task.round)
        votes = {vote.question: vote for vote in self.store.votes(rater, task.key)}
        prompt = self.study.prompts[self.study.pairs[task.pair].prompt]
        return {
            "name": self.name_of(rater, task),
            "left": self.name_of(rater, task, LEFT),
            "right": self.name_of(rater, task, RIGHT),
            "text": prompt.text if any(question.shows_text for question in questions) else None,
            "questions": [{"name": q.name, "text": q.text, "shows_text": q.shows_text} for q in questions],
            "choices": {name: vote.choice for name, vote in votes.items()},
            "stamp": max((vote.stamp for vote in votes.values()), default=0),
            "comment": self.store.comments().get((rater, task.key), ""),
        }

    def vote(self, rater: str, body: dict[str, Any]) -> dict[str, Any]:
        """Write one vote; the answer says what stands."""
        task = self._task_of(rater, body)
        if body.get("question") not in [question.name for question in self.study.asked(task.round)]:
            raise HTTPException(400, "that question is not asked of this pair")
        if body.get("choice") not in SIDES:
            raise HTTPException(400, "a choice is left, right or tie")
        if type(body.get("stamp")) is not int or not 0 <= body["stamp"] < 1 << 53:
            raise HTTPException(400, "stamp is a whole number")
        seconds = body.get("seconds")
        # Compared, since isfinite() fails at a whole number of hundreds of digits.
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not -math.inf < seconds < math.inf:
            raise HTTPException(400, "seconds is a number")
        seconds = round(float(min(max(seconds, 0), 86400)), 2)
        self.store.put(Vote(rater, task.key, body["question"], body["choice"], body["stamp"], seconds))
        shown = self._task(rater, task)
        return {"choices": shown["choices"], "stamp": shown["stamp"]}

    def comment(self, rater: str, body: dict[str, Any]) -> dict[str, Any]:
        """Keep a remark."""
        task, text = self._task_of(rater, body), body.get("text")
        if not isinstance(text, str) or len(text) > MAX_COMMENT:
            raise HTTPException(400, f"a comment is a text of at most {MAX_COMMENT} characters")
        self.store.comment(rater, task.key, whole(text).replace("\0", "").strip())
        return {}

    def go_on(self, rater: str, body: dict[str, Any]) -> dict[str, Any]:
        """Leave a task whose questions are all answered, and show the next."""
        task = self._task_of(rater, body)
        if missing := [q.name for q in self.study.asked(task.round) if q.name not in self._task(rater, task)["choices"]]:
            raise HTTPException(409, f"there is no vote yet on {' and '.join(missing)}")
        self.store.finish(rater, task.key)
        return self.state(rater, _later(body))

    def go_back(self, rater: str, body: dict[str, Any]) -> dict[str, Any]:
        """Open the task that was left last again."""
        self.store.reopen(rater)
        return self.state(rater)

    def look(self, rater: str, body: dict[str, Any]) -> dict[str, Any]:
        """Where the rater stands."""
        return self.state(rater, _later(body))

    def picture(self, rater: str, name: str) -> bytes:
        """A picture as PNG, encoded anew: what its file says besides its pixels (a prompt, a model, a camera) stays here."""
        found = self._pictures.get((rater, name))
        if found is None:
            raise HTTPException(404, "there is no such picture")
        task, side = found
        shown = self.study.sides(task)[side]
        try:
            picture = self.study.picture(self.study.pairs[task.pair], shown)
            return plain_png(read_picture(self.study.sets[shown].root, picture))
        except BadImage:
            raise HTTPException(410, "this picture cannot be read any more") from None

    def _task_of(self, rater: str, body: dict[str, Any]) -> Task:
        task = self._tasks.get((rater, str(body.get("task"))))
        if task is None:
            raise HTTPException(404, "there is no such pair")
        return task


def plain_png(data: bytes) -> bytes:
    """The pixels of an encoded image as PNG, upright, on white, and nothing else of it. Raises BadImage."""
    image = decode(data)
    image.info.clear()
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def vote_app(voting: Voting, hosts: tuple[str, ...] = (), rates: Rates | None = None) -> Starlette:
    """The app of ``voting``; ``hosts`` and ``rates`` as ``local_app`` has them."""

    def show(request: Request) -> Response:
        study, rater = voting.study, request.state.owner
        together = study.ask == "together"
        return page("vote", study.title, voting.keys.tokens[rater], title=study.title, rater=rater, together=together)

    def picture(request: Request) -> Response:
        return Response(voting.picture(request.state.owner, request.path_params["name"]), media_type="image/png")

    def action(act: Callable[[str, dict[str, Any]], dict[str, Any]]) -> Callable[[Request, Any], dict[str, Any]]:
        def done(request: Request, body: Any) -> dict[str, Any]:
            if not isinstance(body, dict):
                raise HTTPException(400, "what is sent is an object")
            try:
                return act(request.state.owner, body)
            except Refusal as refusal:
                raise HTTPException(409, str(refusal)) from None
            except sqlite3.Error as error:
                raise HTTPException(507, f"this could not be written ({error})") from None

        return done

    actions = {
        "state": voting.look, "vote": voting.vote, "comment": voting.comment, "next": voting.go_on, "back": voting.go_back,
    }  # fmt: skip
    routes = [Route("/", show), Route("/picture/{name}", picture)]
    routes += [Route(f"/api/{name}", taking_json(action(act)), methods=["POST"]) for name, act in actions.items()]
    return local_app(routes, voting.keys.rater, hosts, rates or Rates(rate=50, burst=400))


def _later(body: dict[str, Any]) -> frozenset[str]:
    names = body.get("later", [])
    if not isinstance(names, list) or len(names) > 1000 or not all(isinstance(name, str) for name in names):
        raise HTTPException(400, "later is a list of pairs")
    return frozenset(names)


def addresses(study: Study, host: str, port: int) -> list[str]:
    """One address for each rater, to be sent to that rater alone."""
    keys = open_keys(study)
    return [f"{rater}: {address_of(host, port)}?token={quote(keys.tokens[rater])}" for rater in study.tasks]


def serve_votes(study: Study, host: str, port: int, hosts: tuple[str, ...], about: list[str]) -> None:
    """Print ``about`` and the addresses, and serve the vote page until Ctrl-C or SIGTERM. Raises UserError."""
    store = Store(study)
    app = vote_app(Voting(study, store, open_keys(study)), (host, *hosts))
    risk = "who reads an address can vote as that rater"
    serve(app, host, port, lambda port: [*about, *addresses(study, host, port)], risk)
    store.close()
    print(f"ended; every vote is in {store.path}. action=serve study={study.folder} goes on, action=results counts.")
