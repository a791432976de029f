"""The vote page: what its server gives and refuses, and the page in a real browser, through reloads and crashes."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from browser import Program, Served, in_browser, listen, refuses_bodies, refuses_strangers, serves_no_files
from commands import user_error, wait_for
from programs import script
from vote_studies import HOSTILE, SECRET, pixels_of, study_of, write_picture

from paradiffusion.apps.serving import Rates
from paradiffusion.apps.serving import listen as listen_at
from paradiffusion.apps.vote import Voting, open_keys, vote_app
from paradiffusion.evaluation.votes.vote_store import Store
from paradiffusion.evaluation.votes.vote_study import Study


class Asking(Served):
    """A study served in this process, and requests to it as a rater."""

    def __init__(self, study: Study, **options: Any) -> None:
        self.study, self.store, self.keys = study, Store(study), open_keys(study)
        self.voting = Voting(study, self.store, self.keys)
        super().__init__(vote_app(self.voting, **options), self.keys.tokens["anna"])

    def close(self) -> None:
        super().close()
        self.store.close()

    def of(self, path: str, body: Any = None, rater: str = "anna") -> tuple[int, bytes, dict[str, str]]:
        return self.ask(path, body, X_Token=self.keys.tokens[rater])

    def json(self, path: str, body: Any, rater: str = "anna") -> Any:
        status, data, _ = self.of(path, body, rater)
        assert status == 200, data
        return json.loads(data)

    def state(self, rater: str = "anna") -> Any:
        return self.json("/api/state", {}, rater)


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., Asking]]:
    """``serving(prompts=3, ...)``: a study, served; the keywords are those of ``study_of``, ``hosts`` and ``rates`` the app's."""
    opened: list[Asking] = []

    def start(prompts: int = 3, hosts: tuple[str, ...] = (), rates: Rates | None = None, **options: Any) -> Asking:
        opened.append(Asking(study_of(tmp_path, prompts, **options), hosts=hosts, rates=rates))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def vote(task: dict[str, Any], choice: str = "left", **changes: Any) -> dict[str, Any]:
    question = task["questions"][0]["name"]
    return {"task": task["name"], "question": question, "choice": choice, "stamp": 5, "seconds": 1.5, **changes}


# --- the server


def test_a_whole_study_and_no_answer_names_a_set_or_gives_a_file_away(serving: Any) -> None:
    served = serving(4, missing={"street-01": f"{SECRET} ran out of memory"}, sets=3, retest=1)
    study, seen = served.study, []

    def taking(*arguments: Any) -> tuple[int, bytes, dict[str, str]]:
        answer = served.of(*arguments)
        seen.append(repr(answer[2]).encode() + answer[1])
        return answer

    status, page, headers = taking(f"/?token={served.keys.tokens['anna']}")
    assert status == 200 and b"<title>Which picture?</title>" in page
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and headers["Referrer-Policy"] == "no-referrer"
    pictures: dict[str, bytes] = {}
    for rater in study.tasks:
        state = json.loads(taking("/api/state", {}, rater)[1])
        total, texts, orders = state["total"], 0, []
        while "task" in state:
            task = state["task"]
            orders.append(task["name"])
            for side in ("left", "right"):
                status, data, headers = taking(f"/picture/{task[side]}", None, rater)
                assert (status, headers["Content-Type"], headers["Cache-Control"]) == (200, "image/png", "no-store")
                assert data.startswith(b"\x89PNG") and not {b"tEXt", b"iTXt", b"eXIf", b"iCCP"} & set(_chunks(data))
                assert pictures.setdefault(task[side], data) == data
            texts += task["text"] is not None
            assert (state["round"] == 1) == (task["text"] is not None)  # appeal is asked without the text
            assert task["questions"][0]["name"] == ("faithfulness", "appeal")[state["round"] - 1]
            assert taking("/api/next", {"task": task["name"]}, rater)[0] == 409  # not before the vote
            assert taking("/api/vote", vote(task, "tie"), rater)[0] == 200
            state = json.loads(taking("/api/next", {"task": task["name"]}, rater)[1])
        assert state["done"] == total == len(set(orders)) and 2 * texts == total
    shown = sum(study.settled(study.pairs[t.pair]) is None for own in study.tasks.values() for t in own)
    assert len(pictures) == 2 * shown  # a name for each rater, pair and side
    for path in ("/results", "/api/results", "/picture/nothing", "/study.json", "/votes.sqlite", "/.tokens.json"):
        assert taking(path)[0] == 404
    taking("/api/vote", {"task": 1})
    taking("/api/vote", b"{")
    whole = b"".join(seen).lower()
    folder = str(study.folder.parent).encode().lower()
    assert len(seen) > 100 and SECRET.encode() not in whole and folder not in whole and b"street-0" not in whole


def test_what_is_no_vote_is_refused(serving: Any) -> None:
    served = serving(hosts=("Votes.lab.example",))
    task, url = served.state()["task"], "/api/vote"
    refuses_strangers(served, [("/", None), (f"/picture/{task['left']}", None), (url, vote(task))])
    assert served.ask("/", Host="votes.lab.example:8766")[0] == 200 and served.ask("/", Host="lab.example")[0] == 400
    serves_no_files(served, [
        "/picture/../study.json", "/picture/..%2f..%2fetc%2fpasswd", "/../../etc/passwd", "/picture/", "/picture/00000.png",
        "/images/00000.png", "/.tokens.json", "/picture/%00", "/static/../vote.py", "/static/..%2fvote.py", "/static/page.html",
    ])  # fmt: skip
    refuses_bodies(served, url, vote(task), [
        {"choice": "both"}, {"choice": None}, {"question": "appeal"}, {"question": "x"}, {"stamp": "5"}, {"stamp": True},
        {"stamp": -1}, {"stamp": 1 << 60}, {"seconds": "1"}, {"seconds": float("nan")}, {"seconds": None},
    ])  # fmt: skip
    for name in ("unknown", None, 7, [task["name"]]):
        assert served.ask(url, {**vote(task), "task": name})[0] == 404
    assert served.ask("/api/comment", {"task": task["name"], "text": "x" * 2001})[0] == 400
    assert served.ask("/api/state", {"later": "x"})[0] == 400 == served.ask("/api/state", {"later": [1]})[0]
    assert served.ask("/", method="PUT")[0] == 405 == served.ask("/api/state")[0] and served.store.votes() == []
    served.json(url, vote(task, seconds=10**400))  # more than a float holds
    served.json("/api/comment", {"task": task["name"], "text": "cut \ud83d \0 'quoted"})
    assert served.store.votes()[0].seconds == 86400 and list(served.store.comments().values()) == ["cut ?  'quoted"]
    assert len({"", *served.keys.tokens.values()}) == 3
    mode = (served.study.folder / ".tokens.json").stat().st_mode & 0o777
    assert mode == 0o600 and open_keys(served.study) == served.keys
    for port in (served.port, 99999):
        user_error("cannot be listened on", listen_at, "127.0.0.1", port)


def _chunks(data: bytes) -> Iterator[bytes]:
    """The kinds of chunks in a PNG."""
    at = 8
    while at < len(data):
        yield data[at + 4 : at + 8]
        at += 12 + int.from_bytes(data[at : at + 4], "big")


def test_the_pictures_are_those_of_the_pair_on_the_sides_that_are_counted(serving: Any) -> None:
    served = serving(4)
    study = served.study
    for task in study.tasks["anna"]:
        pair = study.pairs[task.pair]
        sides = (pair.set_b, pair.set_a) if task.flipped else (pair.set_a, pair.set_b)
        for number, name in enumerate(sides):
            data = served.ask(f"/picture/{served.voting.name_of('anna', task, number)}")[1]
            one = study.sets[name]
            assert pixels_of(data) == pixels_of((one.root / one.pictures[pair.prompt][0].file).read_bytes())


def test_a_picture_that_was_changed_or_led_elsewhere_is_not_shown_and_can_be_passed_over(serving: Any, tmp_path: Path) -> None:
    served = serving(2)
    study, task = served.study, served.state()["task"]
    files = [one.root / row[0].file for one in study.sets.values() for row in one.pictures.values()]
    for number, file in enumerate(files):
        file.rename(tmp_path / f"private-{number}.png")
        file.symlink_to(tmp_path / f"private-{number}.png")  # the same bytes, but outside of the set's folder
    status, body, _ = served.ask(f"/picture/{task['left']}")
    assert status == 410 and b"cannot be read any more" in body
    for file in files:
        file.unlink()
        write_picture(file, 77)  # a picture, but not that of the study
    assert served.ask(f"/picture/{task['left']}")[0] == 410
    state = served.json("/api/state", {"later": [task["name"]]})
    assert state["task"]["name"] != task["name"] and state["later"] == 1 and state["done"] == 0


def test_one_rater_reaches_nothing_of_another(serving: Any) -> None:
    served = serving()
    anna, ben = served.state("anna")["task"], served.state("ben")["task"]
    assert {anna["name"], anna["left"], anna["right"]}.isdisjoint({ben["name"], ben["left"], ben["right"]})
    for path, body in (
        (f"/picture/{ben['left']}", None), ("/api/vote", vote(ben)), ("/api/next", {"task": ben["name"]}),
        ("/api/comment", {"task": ben["name"], "text": "x"}),
    ):  # fmt: skip
        assert served.of(path, body, "anna")[0] == 404
    served.json("/api/vote", vote(ben, "right"), "ben")
    served.json("/api/comment", {"task": ben["name"], "text": "hm"}, "ben")
    assert served.state("anna")["task"]["choices"] == {} and served.state("anna")["task"]["comment"] == ""
    assert served.state("ben")["task"]["choices"] == {"faithfulness": "right"}
    assert [v.rater for v in served.store.votes()] == ["ben"]


def test_a_vote_that_cannot_be_written_is_not_acknowledged(serving: Any) -> None:
    served = serving()
    task = served.state()["task"]
    served.store._base.execute("PRAGMA query_only=ON")  # as on a disk that takes nothing more
    status, body, _ = served.ask("/api/vote", vote(task))
    assert status == 507 and b"could not be written" in body
    served.store._base.execute("PRAGMA query_only=OFF")
    served.json("/api/vote", vote(task))
    assert len(served.store.votes()) == 1


def test_two_tabs_of_one_rater_do_not_undo_each_other(serving: Any) -> None:
    served = serving()
    task = served.state()["task"]
    served.json("/api/vote", vote(task, "left", stamp=10))
    assert served.json("/api/vote", vote(task, "right", stamp=9))["choices"] == {"faithfulness": "left"}  # came late
    after = served.json("/api/next", {"task": task["name"]})
    assert served.json("/api/next", {"task": task["name"]}) == after  # a double click does not skip a pair
    assert served.ask("/api/vote", vote(task, "right", stamp=20))[0] == 409
    assert served.json("/api/back", {})["task"]["name"] == task["name"]
    assert served.json("/api/vote", vote(task, "right", stamp=20))["choices"] == {"faithfulness": "right"}


def test_too_many_requests_and_connections_are_refused(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serving(rates=Rates(rate=0.001, burst=3))
    asked = [("/", None), ("/nothing", served.token), ("/static/app.css", None), ("/", served.token), ("/static/app.css", None)]
    assert [served.ask(path, X_Token=token)[0] for path, token in asked] == [403, 404, 200, 429, 429]
    monkeypatch.setattr("paradiffusion.apps.serving.PATIENCE", 4)
    served = serving()
    served.server.config.limit_concurrency = 3
    idle = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(2)]
    half = f"POST /api/state HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nX-Token: {served.token}\r\n"
    idle[0].sendall(f"{half}Content-Length: 9\r\n\r\n{{".encode())
    wait_for(lambda: len(served.server.server_state.connections) == 2)
    assert served.ask("/")[0] == 503
    assert idle[1].recv(99) == b"" and idle[0].recv(99).startswith(b"HTTP/1.1 400")  # what says nothing has to go
    wait_for(lambda: not served.server.server_state.connections)
    assert served.ask("/")[0] == 200
    for one in idle:
        one.close()


def test_mistakes_on_the_command_line_are_one_sentence(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        ([], "action= is missing"),
        (["action=serve", f"study={tmp_path / 'new'}", "sets={a: x, b: y}", "raters=[r]"], "the set a is no folder: x"),
        (["action=results", f"study={tmp_path / 'new'}"], "holds no study.json"),
        (["action=tokens", f"study={tmp_path / 'new'}", "given=[x]"], r"hosts, output \(key=value\)"),
    ):
        user_error(message, script("vote").main, arguments)
    for name in [name for name in sys.modules if name.startswith(("starlette", "uvicorn", "paradiffusion.apps"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette", None)
    for program, place in (("vote", "study"), ("select", "folder")):
        action = {"vote": "serve", "select": "review"}[program]
        done = command(f"scripts/{program}.py", f"action={action}", f"{place}={tmp_path / 'new'}")
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "the extra apps" in done.stderr
        assert not (tmp_path / "new").exists()


# --- the command


class Server(Program):
    """The vote of ``study``."""

    def __init__(self, study: Study) -> None:
        super().__init__("scripts/vote.py", "action=serve", f"study={study.folder}", addresses=len(study.tasks))
        self.study = study

    def url(self, rater: str) -> str:
        return self.urls[list(self.study.tasks).index(rater)]

    def votes(self, rater: str) -> list[str]:
        """The choices as they lie on disk."""
        base = sqlite3.connect(f"file:{quote(str(self.study.folder / 'votes.sqlite'))}?mode=ro", uri=True)
        asked = "SELECT task, question, choice FROM votes WHERE rater = ? ORDER BY rowid"
        rows = base.execute(asked, (rater,)).fetchall()
        base.close()
        assert len(rows) == len({row[:2] for row in rows})
        return [choice for _, _, choice in rows]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(prompts: int, **options: Any) -> Server:
        servers.append(Server(study_of(tmp_path, prompts, **options)).start())
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def at(page: Any, done: int) -> None:
    """Wait until the page shows the pair after ``done`` others."""
    page.wait_for_selector(f"body[data-done='{done}']:not(.waiting)")
    page.wait_for_selector("body[aria-busy=false]")


def saved(page: Any) -> None:
    page.wait_for_selector("#status.good")
    page.wait_for_selector("body[aria-busy=false]")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_server_ends_without_a_word_on_what_it_cut_off(started: Any, number: int) -> None:
    server = started(2)
    held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
    held[0].sendall(b"garbage\r\n\r\n")
    assert held[0].recv(99).startswith(b"HTTP/1.1 400")
    token = server.url("anna").partition("=")[2].encode()
    held[1].sendall(b"POST /api/vote HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
    held[1].sendall(b"X-Token: " + token + b"\r\nContent-Length: 50\r\n\r\n{")  # and never the rest
    assert server.end(number) == 0


# --- in the browser


@in_browser
def test_two_raters_vote_at_once_one_reloads_and_the_server_is_killed(started: Any, browser: Any) -> None:
    server, wrong, pages = started(3), [], {}
    contexts = [browser.new_context() for _ in range(2)]
    for rater, context in zip(("anna", "ben"), contexts, strict=True):
        pages[rater] = context.new_page()
        listen(pages[rater], wrong)
        pages[rater].goto(server.url(rater))
    anna, ben = pages["anna"], pages["ben"]
    keys, choices = {"anna": "alt", "ben": "tla"}, {"a": "left", "l": "right", "t": "tie"}
    for number in range(2):  # both walk on, by turns
        for rater, page in pages.items():
            at(page, number)
            page.keyboard.press(keys[rater][number])
        for rater, page in pages.items():
            saved(page)
            assert server.votes(rater) == [choices[key] for key in keys[rater][: number + 1]]  # before the next pair
            page.keyboard.press("Enter")
    at(anna, 2)
    anna.keyboard.press("a")
    saved(anna)
    anna.keyboard.press("t")  # another mind, and a reload before going on
    saved(anna)
    name = anna.evaluate("document.body.dataset.task")
    anna.reload()
    at(anna, 2)
    assert anna.evaluate("document.body.dataset.task") == name
    assert anna.inner_text("button[aria-pressed=true]").split()[0] == "tie" and wrong == []

    server.end(signal.SIGKILL)
    assert [server.votes(rater) for rater in pages] == [["left", "right", "tie"], ["tie", "right"]]
    at(ben, 2)
    ben.keyboard.press("a")
    ben.wait_for_selector("#status.bad")
    assert "does not answer" in ben.inner_text("#status")
    ben.keyboard.press("Enter")  # nothing is shown over a vote that is not saved
    assert ben.evaluate("document.body.dataset.done") == "2"
    server.start()
    saved(ben)
    assert server.votes("ben") == ["tie", "right", "left"]
    server.end(signal.SIGKILL)
    anna.keyboard.press("l")  # and now the page is closed before the server is back
    anna.wait_for_selector("#status.bad")
    anna.close()
    server.start()
    anna = contexts[0].new_page()
    listen(anna, wrong)
    anna.goto(server.url("anna"))
    at(anna, 2)
    assert server.votes("anna") == ["left", "right", "right"]
    for page, rater in ((anna, "anna"), (ben, "ben")):
        page.keyboard.press("Enter")
        for number in range(3, 6):  # appeal, without the text
            at(page, number)
            assert "Which picture looks better?" in page.inner_text("#questions") and not page.is_visible("#prompt")
            page.keyboard.press("ArrowLeft")
            saved(page)
            page.keyboard.press("Enter")
        page.wait_for_selector("body[data-task=done]")
        assert "All done" in page.inner_text("#done") and page.inner_text("#counts") == "6 of 6"
        assert len(server.votes(rater)) == 6 and SECRET not in page.content()
    assert [text for text in wrong if "ERR_CONNECTION_REFUSED" not in text] == []  # the browser's own word on the crash
    late = "task => storage({task, question: 'faithfulness', choice: 'left', stamp: Date.now() + 9, seconds: 1})"
    anna.evaluate(late, name)  # as if another tab had gone on while this vote waited
    anna.reload()
    anna.wait_for_selector("#status.bad")
    assert "Not saved: you have gone on" in anna.inner_text("#status") and len(server.votes("anna")) == 6
    for context in contexts:
        context.close()
    assert server.end(signal.SIGTERM) == 0


@in_browser
def test_the_page_by_mouse_and_keys_with_both_questions_on_one_screen(
    started: Any, browser: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server = started(3, raters="[anna]", ask="together", title="</script><i>Look</i>")
    page, wrong = browser.new_page(viewport={"width": 1200, "height": 760}), []
    listen(page, wrong)
    page.goto(server.url("anna"))
    at(page, 0)
    assert page.inner_text("h1") == page.title() == "</script><i>Look</i>" and page.evaluate("window.hit") is None
    rows = page.query_selector_all(".question")
    assert len(rows) == 2 and rows[1].query_selector("button").is_disabled()  # faithfulness first
    assert page.is_disabled("#next") and not page.evaluate("document.body.classList.contains('dimmed')")
    page.click(".question:nth-child(1) button[data-side=right]")
    saved(page)
    assert page.evaluate("document.body.classList.contains('dimmed')") and page.is_disabled("#next")
    page.keyboard.press("t")
    saved(page)
    page.click(".question:nth-child(1) button[data-side=left]")  # another mind on the first
    saved(page)
    assert sorted(server.votes("anna")) == ["left", "tie"]
    page.keyboard.press("c")
    page.keyboard.type("the l and t are letters here")
    page.keyboard.press("Escape")
    page.wait_for_selector("#status.good")

    page.keyboard.press("z")
    box = page.query_selector("#left .frame").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.75)
    styles = [page.eval_on_selector(f"#{side} img", "i => [i.style.transform, i.style.transformOrigin]") for side in ("left", "right")]
    assert styles[0] == styles[1] and styles[0][0] == "scale(3)" and styles[0][1].startswith("25% 75%")
    page.keyboard.press("ArrowRight")  # walks in the picture, and does not vote
    assert page.eval_on_selector("#right img", "i => i.style.transformOrigin").startswith("35% 75%")
    page.mouse.click(box["x"] + 20, box["y"] + 20)
    assert page.eval_on_selector("#left img", "i => i.style.transform") == ""

    page.dblclick("#next")  # does not pass over a pair
    at(page, 1)
    page.keyboard.press("l")
    saved(page)
    page.keyboard.press("u")
    at(page, 0)
    assert page.input_value("#comment") == "the l and t are letters here"
    page.keyboard.press("Enter")
    at(page, 1)
    assert "right" in page.inner_text("button[aria-pressed=true]")  # what was said before going back
    page.keyboard.press("a")
    saved(page)
    page.keyboard.press("Enter")
    at(page, 2)
    texts = {prompt.text for prompt in server.study.prompts.values()}
    assert page.text_content("#text") in texts and HOSTILE in texts
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth") and wrong == []
    page.set_viewport_size({"width": 390, "height": 780})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.is_visible("#prompt") and page.is_visible("#right img") and page.is_visible("#next")
    page.close()

    seconds = sqlite3.connect(server.study.folder / "votes.sqlite").execute("SELECT seconds FROM votes").fetchall()
    assert all(0 <= one < 60 for (one,) in seconds)
    folder = str(server.study.folder)  # while the server runs
    assert script("vote").main(["action=results", f"study={folder}"]) == 0
    assert "screens voted on: 2 of 3" in capsys.readouterr().out
    page = browser.new_page()
    listen(page, wrong)
    page.goto(f"file://{quote(folder)}/results.html")
    assert f"{SECRET}-0" in page.inner_text("table") and "the l and t are letters here" in page.content() and wrong == []
    page.close()
