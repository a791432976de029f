"""The playground's page in a browser: drawn, coloured, a sentence left out, and refused; two models on the same seeds, behind a password."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import in_browser, listen
from commands import ROOT, user_error
from official_models import MODERN, make_ours

pytest.importorskip("gradio", reason="needs Gradio (pip install '.[apps]'), which is not among the tests' requirements")

from paradiffusion.apps.playground import AppOptions
from paradiffusion.apps.playground_page import serve

TEXT = "A large red circle sits in the top left corner. Rain <img src=x onerror=alert(1)> fell. The road was empty."


@pytest.fixture
def play(tmp_path: Path, codec_folder: Path) -> Iterator[Callable[..., tuple[str, str]]]:
    """``play("key=value", ...)``: app.py with two tiny models; its address and all that it printed."""
    for name, config in (("one", {}), ("two", MODERN)):
        make_ours(tmp_path / name, codec_folder, **config)
    compare = f"compare=[{tmp_path / 'one'},{tmp_path / 'two'}]"
    running: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> tuple[str, str]:
        command = [sys.executable, "app.py", compare, "port=0", f"output_dir={tmp_path / 'out'}", *arguments]
        program = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        running.append(program)
        assert program.stdout is not None
        first = program.stdout.readline()
        found = re.search(r"http://\S+:(\d+)/", first)
        assert found, first
        return f"http://127.0.0.1:{found[1]}/", program.stdout.readline() if "host=0.0.0.0" in arguments else ""

    yield start
    for program in running:
        program.send_signal(signal.SIGINT)
        assert program.wait(60) == 0


@in_browser
def test_a_paragraph_is_drawn_coloured_and_drawn_without_a_sentence(browser: Any, play: Any, tmp_path: Path) -> None:
    address, _ = play("max_characters=300")
    wrong: list[str] = []
    page = browser.new_page()
    listen(page, wrong)
    page.goto(address)
    page.fill("#text textarea", TEXT)
    page.fill("#count input", "2")
    page.fill("#steps input", "2")
    page.fill("#seed input", "7")
    page.click("#draw")
    done = "document.querySelector('#state textarea').value.startsWith('Done')"
    page.wait_for_function(done, timeout=120_000)
    assert [page.locator(f"#whole{n} img").count() for n in range(8)] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert [f"seed {seed}" in page.inner_text(f"#slot{n}") for n, seed in enumerate((7, 7, 8, 8))] == [True] * 4
    words = page.inner_text("#words1")
    assert "<img src=x" in words and len(re.findall("[✓◐✗?] ", words)) == 3
    page.locator("#words1").get_by_text("The road was empty.").click()
    page.wait_for_selector("#side1 img", timeout=60_000)
    assert "The road was empty." in page.input_value("#note1 textarea") and page.locator("#side0 img").count() == 0
    page.fill("#height input", "33")  # no multiple of what the models draw
    page.click("#draw")
    page.wait_for_selector("text=/height.*33/", timeout=60_000)
    assert not [one for one in wrong if "33" not in one], wrong
    for name in ("one", "two"):
        rows = [json.loads(line) for line in (tmp_path / "out" / name / "manifest.jsonl").read_text().splitlines()]
        assert [row["seed"] for row in rows[:2]] == [7, 8] and {row["settings"]["steps"] for row in rows} == {2}


def test_a_network_needs_the_password_and_a_name_of_this_machine(play: Any) -> None:
    address, said = play("host=0.0.0.0")
    found = re.search(r"user (\S+), password (\S+);", said)
    assert found and len(found[2]) > 20

    def config(path: str = "config", data: bytes | None = None, **headers: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(urllib.request.Request(address + path, data, headers), timeout=20) as answer:
                return answer.status, answer.headers.get("set-cookie", "")
        except urllib.error.HTTPError as error:
            return error.code, ""

    assert config()[0] == 401 and config(Host="evil.example")[0] == 400
    assert config("login", f"username={found[1]}&password=wrong".encode())[0] == 400
    status, cookie = config("login", f"username={found[1]}&password={found[2]}".encode())
    assert status == 200 and config(Cookie=cookie.partition(";")[0])[0] == 200


def test_mistakes_are_said_before_models_load(tmp_path: Path) -> None:
    user_error("characters", serve, AppOptions(host="0.0.0.0", token="short"))
    user_error("cannot be listened on", serve, AppOptions(port=99_999))
    user_error("nowhere", serve, AppOptions(port=0, examples=str(tmp_path / "nowhere.txt")))
