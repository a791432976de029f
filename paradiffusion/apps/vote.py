"""The vote server: each rater's pairs, one by one, and nothing that says which picture is whose."""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import math
import os
import secrets
import sqlite3
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, Final

from paradiffusion.apps.serving import LocalHandler, LocalServer, Pace, Query, Refused, listen, whole
from paradiffusion.data.images import BadImage, decode
from paradiffusion.errors import UserError
from paradiffusion.evaluation.votes.vote_store import SIDES, Refusal, Store, Vote
from paradiffusion.evaluation.votes.vote_study import Study, Task
from paradiffusion.evaluation.votes.voted_sets import read_picture
from paradiffusion.pages import render

TOKENS: Final = ".tokens.json"
MAX_COMMENT: Final = 2000
KEPT_BYTES: Final = 256 << 20  # of encoded pictures: raters who share a pair come to it at different times
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
    partial = path.with_name(f"{TOKENS}.part")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        json.dump({"secret": keys.secret.hex(), "raters": keys.tokens}, file, ensure_ascii=False, indent=1)
    os.replace(partial, path)
    return keys


@dataclass
class _Names:
    """A rater's tasks and pictures under the random names that the browser gets; ``of`` has the names of tasks by key."""

    of: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)
    pictures: dict[str, tuple[Task, int]] = field(default_factory=dict)


class Voting:
    """A study that is being voted on."""

    def __init__(self, study: Study, store: Store, keys: Keys) -> None:
        self.study, self.store, self.keys = study, store, keys
        self._names = {rater: _Names() for rater in study.tasks}
        self._shown = {
            r: [t for t in ts if study.settled(study.pairs[t.pair]) is None] for r, ts in study.tasks.items()
        }
        for rater, tasks in self._shown.items():
            for task in tasks:
                name = self._names[rater].of[task.key] = self.name_of(rater, task)
                self._names[rater].tasks[name] = task
                for side in (LEFT, RIGHT):
                    self._names[rater].pictures[self.name_of(rater, task, side)] = (task, side)
        self._encoded: OrderedDict[tuple[Path, str], bytes] = OrderedDict()
        self._guard = Lock()

    def name_of(self, rater: str, task: Task, side: int | None = None) -> str:
        """The random name of a task, or of one of its pictures, that this rater's browser gets."""
        text = json.dumps([rater, task.key, side])
        return hmac.new(self.keys.secret, text.encode(), hashlib.sha256).hexdigest()[:32]

    def state(self, rater: str, later: frozenset[str] = frozenset()) -> dict[str, Any]:
        """What the rater's page shows: the first task that is not finished, and how far they are.

        Args:
            later: names of tasks that are passed over, since a picture could not be shown.
        """
        tasks, finished = self._shown[rater], self.store.finished(rater)
        rest = [task for task in tasks if task.key not in finished]
        ahead = [task for task in rest if self._names[rater].of[task.key] not in later]
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
            "comment": self.store.comment_on(rater, task.key),
        }

    def vote(self, rater: str, body: dict[str, Any]) -> dict[str, Any]:
        """Write one vote; the answer says what stands. Raises Refused."""
        task = self._task_of(rater, body)
        if body.get("question") not in [question.name for question in self.study.asked(task.round)]:
            raise Refused(400, "that question is not asked of this pair")
        if body.get("choice") not in SIDES:
            raise Refused(400, "a choice is left, right or tie")
        if type(body.get("stamp")) is not int or not 0 <= body["stamp"] < 1 << 53:
            raise Refused(400, "stamp is a whole number")
        seconds = body.get("seconds")
        # Compared, since isfinite() fails at a whole number of hundreds of digits.
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not -math.inf < seconds < math.inf:
            raise Refused(400, "seconds is a number")
        seconds = round(float(min(max(seconds, 0), 86400)), 2)
        self.store.put(Vote(rater, task.key, body["question"], body["choice"], body["stamp"], seconds))
        shown = self._task(rater, task)
        return {"choices": shown["choices"], "stamp": shown["stamp"]}

    def comment(self, rater: str, body: dict[str, Any]) -> dict[str, Any]:
        """Keep a remark. Raises Refused."""
        task, text = self._task_of(rater, body), body.get("text")
        if not isinstance(text, str) or len(text) > MAX_COMMENT:
            raise Refused(400, f"a comment is a text of at most {MAX_COMMENT} characters")
        self.store.comment(rater, task.key, whole(text).replace("\0", "").strip())
        return {}

    def go_on(self, rater: str, body: dict[str, Any]) -> dict[str, Any]:
        """Leave a task whose questions are all answered, and show the next. Raises Refused."""
        task = self._task_of(rater, body)
        if missing := [
            q.name for q in self.study.asked(task.round) if q.name not in self._task(rater, task)["choices"]
        ]:
            raise Refused(409, f"there is no vote yet on {' and '.join(missing)}")
        self.store.finish(rater, task.key)
        return self.state(rater, _later(body))

    def go_back(self, rater: str, body: dict[str, Any]) -> dict[str, Any]:
        """Open the task that was left last again."""
        self.store.reopen(rater)
        return self.state(rater)

    def look(self, rater: str, body: dict[str, Any]) -> dict[str, Any]:
        """Where the rater stands. Raises Refused."""
        return self.state(rater, _later(body))

    def picture(self, rater: str, name: str) -> bytes:
        """A picture as PNG, encoded anew: what its file says besides its pixels (a prompt, a model, a camera) stays here.

        Raises:
            Refused: for a name that is none of this rater's, and for a picture that can no longer be read.
        """
        found = self._names[rater].pictures.get(name)
        if found is None:
            raise Refused(404, "there is no such picture")
        task, side = found
        pair = self.study.pairs[task.pair]
        shown = self.study.sets[(pair.set_b if task.flipped else pair.set_a) if side == LEFT else
                                (pair.set_a if task.flipped else pair.set_b)]  # fmt: skip
        picture = shown.pictures[pair.prompt][pair.image]
        key = (shown.root, picture.file)
        with self._guard:
            if key in self._encoded:
                self._encoded.move_to_end(key)
                return self._encoded[key]
        try:
            data = plain_png(read_picture(shown.root, picture))
        except BadImage:
            raise Refused(410, "this picture cannot be read any more") from None
        with self._guard:
            self._encoded[key] = data
            while sum(map(len, self._encoded.values())) > KEPT_BYTES and len(self._encoded) > 1:
                self._encoded.popitem(last=False)
        return data

    def _task_of(self, rater: str, body: dict[str, Any]) -> Task:
        task = self._names[rater].tasks.get(str(body.get("task")))
        if task is None:
            raise Refused(404, "there is no such pair")
        return task


def plain_png(data: bytes) -> bytes:
    """The pixels of an encoded image as PNG, upright, on white, and nothing else of it. Raises BadImage."""
    image = decode(data)
    image.info.clear()
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def make_server(voting: Voting, host: str, port: int, names: tuple[str, ...] = ()) -> LocalServer:
    """A server of ``voting``, bound and not yet serving; port 0 takes a free one. Raises UserError."""

    class Own(_Handler):
        pass

    Own.voting = voting
    Own.pace = Pace(rate=50, burst=400)
    return listen(Own, host, port, names)


class _Handler(LocalHandler):
    voting: ClassVar[Voting]
    pace: ClassVar[Pace]
    server_version = "votes"
    timeout = 30
    rater = ""

    def check_token(self, given: str) -> None:
        self.pace.check(self.client_address[0])
        rater = self.voting.keys.rater(given)
        if rater is None:
            raise Refused(403, "the token is missing or wrong: open the address that you were given")
        self.rater = rater

    def get(self, path: str, query: Query) -> None:
        if path == "/":
            nonce = secrets.token_urlsafe(16)
            identity = hashlib.blake2b(self.voting.keys.tokens[self.rater].encode(), digest_size=8).hexdigest()
            study = self.voting.study
            # The identity keeps what waits in the browser apart from that of other raters and studies.
            settings = {"title": study.title, "id": identity, "rater": self.rater, "together": study.ask == "together"}
            text = render("apps/templates/vote.html", nonce=nonce, title=study.title, settings=settings)
            self.send(200, "text/html; charset=utf-8", text.encode("utf-8", "replace"), nonce=nonce)
        elif path.startswith("/picture/"):
            self.send(200, "image/png", self.voting.picture(self.rater, path.removeprefix("/picture/")))
        else:
            raise Refused(404, "there is nothing here")

    def post(self, path: str, query: Query) -> None:
        actions = {
            "/api/state": self.voting.look,
            "/api/vote": self.voting.vote,
            "/api/comment": self.voting.comment,
            "/api/next": self.voting.go_on,
            "/api/back": self.voting.go_back,
        }
        if path not in actions:
            raise Refused(404, "there is nothing here")
        body = self.body()
        if not isinstance(body, dict):
            raise Refused(400, "what is sent is an object")
        try:
            answer = actions[path](self.rater, body)
        except Refusal as refusal:
            raise Refused(409, str(refusal)) from None
        except sqlite3.Error as error:
            raise Refused(507, f"this could not be written ({error})") from None
        self.send_json(answer)


def _later(body: dict[str, Any]) -> frozenset[str]:
    names = body.get("later", [])
    if not isinstance(names, list) or len(names) > 1000 or not all(isinstance(name, str) for name in names):
        raise Refused(400, "later is a list of pairs")
    return frozenset(names)


def check_set_names(study: Study) -> None:
    """Raises UserError where a text that raters read names a set, which would tell them whose picture is whose."""
    texts = [study.title, *(part for q in study.questions for part in (q.name, q.text)), *study.tasks]
    for name in study.sets:
        if len(name) > 2 and any(name.lower() in text.lower() for text in texts):
            raise UserError(
                f"the set's name {name} stands in the title, a question or a rater's name, which raters see; reword it."
            )
