"""The captioner against a server of the OpenAI protocol: what fails for a while, what fails for good, and a second opinion."""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from caption_runs import lines, same
from chat_server import NAME, Asked, ChatServer, chat_server, paragraph
from commands import ROOT
from data_fixtures import shards_of
from training_runs import free_port

from paradiffusion.data.index import load_index, read_sample
from paradiffusion.data.shards import expand_shards, write_shards
from paradiffusion.errors import UserError
from paradiffusion.metrics.endpoint import Address, _pause, _read, headers_of

REFUSAL = "I'm sorry, but I can't help with that."


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server() as running:
        yield running


def arguments(server: ChatServer, folder: Path, *more: str, output: str = "out") -> list[str]:
    return [f"shards={folder / 'in'}", f"output={folder / output}", "engine=endpoint", f"endpoint={server.url}",
            "retry_wait=0.02", "concurrency=4", *more]  # fmt: skip


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "report.json").read_text())
    return found


def test_failures_that_pass_change_nothing(script: ModuleType, server: ChatServer, tmp_path: Path) -> None:
    shards_of(tmp_path / "in", 12, 8)
    assert script.main(arguments(server, tmp_path, output="smooth")) == 0
    server.asked.clear()
    server.faults = {
        0: (429, b'{"error": {"message": "slow down"}}', 0),
        1: (500, b"<html>oops</html>", 0),
        2: (200, b'{"choices": [{"mess', 0),
        3: (200, b'{"choices": []}', 0),
        5: (503, b"", 0),
        7: (200, b"[1]", 0),
        8: (200, b"", 1.5),  # longer than the time-out
    }
    assert script.main(arguments(server, tmp_path, "timeout=1", "concurrency=3")) == 0
    same(tmp_path / "smooth", tmp_path / "out")
    assert len(server.asked) == 12 + 7 and server.most_at_once <= 4  # one that timed out may still be sleeping there
    index = load_index(expand_shards(tmp_path / "out"))
    assert index.kinds == ["short", "long"] and (index.words[:, 1] > 50).all()
    made = report(tmp_path)
    assert made["captioned"] == 12 and made["captions_per_hour"] > 0 and made["captions_per_gpu_hour"] is None
    assert made["models"] == [f"{NAME}@served"]


def test_a_request_is_what_the_protocol_says(script: ModuleType, server: ChatServer, tmp_path: Path) -> None:
    shards_of(tmp_path / "in", 4, 4)
    server.key, os.environ["CAPTION_KEY"] = "secret", "secret"
    more = ("api_key_env=CAPTION_KEY", "image_side=48", "max_new_tokens=200", "temperature=0.5", "endpoint_gpus=2")
    assert script.main(arguments(server, tmp_path, *more)) == 0
    assert sorted(asked.size() for asked in server.asked) == [(28, 48), (48, 28), (48, 38), (48, 48)]
    asked = server.asked[0]
    assert asked.headers["Authorization"] == "Bearer secret"
    assert (asked.body["max_tokens"], asked.body["temperature"], asked.body["model"]) == (200, 0.5, NAME)
    assert len({one.body["seed"] for one in server.asked}) == 4
    made = report(tmp_path)
    assert made["captions_per_gpu_hour"] == pytest.approx(made["captions_per_hour"] / 2)
    assert not any("secret" in path.read_text("latin-1") for path in (tmp_path / "out").iterdir())


def test_a_rejected_answer_is_asked_for_in_other_words(script: ModuleType, server: ChatServer, tmp_path: Path) -> None:
    shards_of(tmp_path / "in", 40, 40)

    def answer(asked: Asked) -> tuple[str, str]:
        said = paragraph(asked.image + asked.prompt.encode())
        if "how the view was made" in asked.prompt:
            return REFUSAL, "stop"
        if "laid out" in asked.prompt:
            return said[:-30], "length"  # trimmed to its last sentence
        return "The image shows a" + said[1:], "stop"

    server.answer = answer
    assert script.main(arguments(server, tmp_path)) == 0
    records = lines(tmp_path / "out" / "000000.jsonl")
    again = [record for record in records if record["rejected"]]
    assert 2 < len(again) < 20 and len(server.asked) == 40 + len(again)
    assert all(record["rejected"][0]["template"] == "style" != record["template"] for record in again)
    assert all(record["caption"] and not record["found"] for record in records)
    made = report(tmp_path)
    assert made["reasons"] == {"too_short": len(again), "refusal": len(again)} and made["rejected_samples"] == 0
    assert made["templates"]["style"]["rejected"] == 1 and made["templates"]["paper"]["rejected"] == 0
    assert made["notes"]["trimmed"] == sum(record["template"] == "spatial" for record in records)
    assert made["notes"]["opening_removed"] == sum(record["template"] == "paper" for record in records)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| refusal |" in text and "- refusal, 000000/" in text


def test_a_retry_in_the_same_words_draws_anew(script: ModuleType, server: ChatServer, tmp_path: Path) -> None:
    shards_of(tmp_path / "in", 1, 1)
    server.answer = lambda asked: (REFUSAL, "stop")
    assert script.main(arguments(server, tmp_path, "prompts=paper", "retries=2", "temperature=0")) == 0
    assert [asked.body["temperature"] for asked in server.asked] == [0, 0.7, 0.7]
    assert len({asked.body["seed"] for asked in server.asked}) == 3
    assert report(tmp_path)["rejected_samples"] == 1


def test_a_signal_stops_it_and_the_same_command_goes_on(
    script: ModuleType, server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards_of(tmp_path / "in", 24, 12)
    plain = server.answer

    def interrupting(asked: Asked) -> tuple[str, str]:
        if len(server.asked) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(asked)

    server.answer = interrupting
    assert script.main(arguments(server, tmp_path)) == 0
    assert "stopped; run the same command again" in capsys.readouterr().out
    journal = tmp_path / "out" / "000000.journal"
    kept = journal.read_text().count("\n")
    assert 0 < kept < 24 and not list((tmp_path / "out").glob("*.tar"))
    server.answer = plain
    server.asked.clear()
    assert script.main(arguments(server, tmp_path)) == 0
    assert len(server.asked) == 24 - kept  # nothing that was answered is asked again
    assert script.main(arguments(server, tmp_path, output="whole")) == 0
    same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize(
    ("more", "change", "words"),
    [
        ((), {"models": ["a", "b"]}, "serves a, b; name one with served="),
        (("served=other",), {}, "served=other is not served at"),
        ((), {"key": "secret"}, "refuses requests without a key"),
        (("api_key_env=NO_SUCH_KEY",), {}, "names an environment variable that is not set"),
        (("api_key_env=PATH",), {"key": "secret"}, "refuses the key in PATH"),
        (("tries=2",), {"faults": dict.fromkeys(range(50), (503, b'{"message": "no room"}', 0))}, "failed 2 times .*no room.*goes on"),
        (("tries=2", "timeout=0.3"), {"faults": dict.fromkeys(range(50), (200, b"", 1.0))}, "no answer within 0.3 s"),
        (("tries=2",), {"faults": dict.fromkeys(range(50), (200, b"{}", 0))}, "no chat completion"),
        ((), {"faults": dict.fromkeys(range(50), (400, b'{"error": {"message": "no multimodal input"}}', 0))}, "refused the first 1. pictures .*no multimodal input"),
        ((), {"faults": {3: (404, b'{"detail": "Not Found"}', 0)}}, "has no /chat/completions .*Not Found.*ends in /v1"),
        ((), {"faults": {3: (307, b"", 0)}}, "status 307"),
    ],
)  # fmt: skip
def test_what_does_not_pass_is_told_in_a_sentence(
    script: ModuleType, server: ChatServer, tmp_path: Path, more: tuple[str, ...], change: dict[str, Any], words: str
) -> None:
    shards_of(tmp_path / "in", 20, 20)
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(UserError, match=words):
        script.main(arguments(server, tmp_path, *more))


def test_nobody_there_and_no_address(script: ModuleType, server: ChatServer, tmp_path: Path) -> None:
    shards_of(tmp_path / "in", 1, 1)
    for url, words in (
        (f"http://127.0.0.1:{free_port()}/v1", "failed 3 times .*onnect"),
        ("localhost:8000", "is no address"),
    ):
        with pytest.raises(UserError, match=words):
            script.main([*arguments(server, tmp_path), f"endpoint={url}"])


def test_a_picture_that_the_server_refuses_is_counted(script: ModuleType, server: ChatServer, tmp_path: Path) -> None:
    shards_of(tmp_path / "in", 12, 12)
    server.faults = {4: (400, b'{"error": {"message": "picture too wide"}}', 0)}
    assert script.main(arguments(server, tmp_path, "concurrency=1")) == 0
    refused = [record for record in lines(tmp_path / "out" / "000000.jsonl") if record["caption"] is None]
    assert [record["rejected"][0]["text"] for record in refused] == ["status 400: picture too wide"]
    assert len(server.asked) == 12  # it is not asked again


def test_claims_are_checked_by_a_second_model(script: ModuleType, server: ChatServer, tmp_path: Path) -> None:
    shards_of(tmp_path / "in", 30, 15)
    server.models = [NAME, "judge"]
    captioner = server.answer

    def answer(asked: Asked) -> tuple[str, str]:
        if asked.body["model"] != "judge":
            return captioner(asked)
        if "lamp" in asked.prompt.partition("about it:")[2]:
            return "No.", "stop"
        return ("Hard to say", "stop") if "clock" in asked.prompt else ("Yes, it is.", "stop")

    server.answer = answer
    more = ("served=tiny-vlm", "judge=judge", "judge_share=0.5")
    assert script.main(arguments(server, tmp_path, *more)) == 0
    judged = report(tmp_path)["judged"]
    captions = judged["captions"]
    assert 8 <= captions <= 22 and judged["claims"] == captions * 8
    # Of the eight sentences of each caption one has a lamp, and one a clock.
    assert (judged["confirmed"], judged["unclear"]) == (captions * 6, captions)
    assert judged["share"] == pytest.approx(6 / 7)
    low, high = judged["interval"]
    assert 0.7 < low < 6 / 7 < high < 0.95
    assert len(judged["unconfirmed"]) == captions and all(" lamp " in one["text"] for one in judged["unconfirmed"])
    asked = len(server.asked)
    assert script.main(arguments(server, tmp_path, *more)) == 0 and len(server.asked) == asked
    for key, value, was in (("judge", "tiny-vlm", "judge"), ("judge_share", "0.9", "0.5")):
        with pytest.raises(
            UserError, match=f"claims .* with {key}={was}, and {key}={value} is asked for; delete judge.json"
        ):
            script.main(arguments(server, tmp_path, *more, f"{key}={value}"))
    for path in (tmp_path / "out").glob("*judge*"):
        path.unlink()
    assert script.main(arguments(server, tmp_path, *more, "judge_share=1")) == 0
    assert report(tmp_path)["judged"]["captions"] == 30


def test_two_captioners_do_not_write_one_shard(script: ModuleType, server: ChatServer, tmp_path: Path) -> None:
    import fcntl

    shards_of(tmp_path / "in", 2, 2)
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / "000000.journal", "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is at work"):
            script.main(arguments(server, tmp_path))


def test_answers_of_other_shapes(script: ModuleType, server: ChatServer, tmp_path: Path) -> None:
    shards_of(tmp_path / "in", 8, 8)
    assert script.main(arguments(server, tmp_path, output="smooth")) == 0
    text = json.dumps({"choices": [{"message": {"content": {"a": 1}}}]}).encode()
    server.asked.clear()
    server.faults = {
        0: (200, text, 0),
        1: (200, b"[" * 100_000, 0),
        2: (524, b"<html>a proxy's time is over</html>", 0),
        3: (200, b'{"choices": [{"message": {"content": "A dog."}}], "usage": {"completion_tokens": 1e999}}', 0),
    }
    assert script.main(arguments(server, tmp_path)) == 0
    same(tmp_path / "smooth", tmp_path / "out")
    parts = [{"type": "text", "text": "A dog "}, {"type": "text", "text": "runs."}]
    assert _read({"choices": [{"message": {"content": parts}}]}).text == "A dog runs."


def test_a_server_that_wants_to_be_paid_rejects_no_picture(
    script: ModuleType, server: ChatServer, tmp_path: Path
) -> None:
    shards_of(tmp_path / "in", 8, 8)
    server.faults = dict.fromkeys(range(4, 50), (402, b'{"error": {"message": "insufficient credits"}}', 0))
    with pytest.raises(UserError, match="402: insufficient credits"):
        script.main(arguments(server, tmp_path))
    server.faults = {}
    assert script.main(arguments(server, tmp_path)) == 0 and report(tmp_path)["captioned"] == 8


def test_answers_do_not_go_to_the_pictures_of_a_changed_shard(
    script: ModuleType, server: ChatServer, tmp_path: Path
) -> None:
    shards_of(tmp_path / "in", 8, 8)
    server.faults = dict.fromkeys(range(4, 50), (402, b"{}", 0))
    with pytest.raises(UserError, match="402"):
        script.main(arguments(server, tmp_path))
    server.faults = {}
    shard = tmp_path / "in" / "000000.tar"
    changed = [read_sample(load_index([shard]), row) for row in (7, 6, 5, 4, 3, 2, 1, 0)]
    write_shards(changed, tmp_path / "in", 8)
    for index in (tmp_path / "in").glob("*.npz"):
        index.unlink()
    with pytest.raises(UserError, match="has changed since its captions were begun"):
        script.main(arguments(server, tmp_path))


def test_a_shard_whose_lines_were_deleted_is_written_again(
    script: ModuleType, server: ChatServer, tmp_path: Path
) -> None:
    shards_of(tmp_path / "in", 4, 2)
    assert script.main(arguments(server, tmp_path)) == 0
    out, plain = tmp_path / "out", server.answer
    (out / "000000.jsonl").unlink()
    (out / "000001.journal").write_bytes(
        b""
    )  # as a kill leaves it that comes between the lines and the end of the journal
    server.answer = lambda asked: (plain(asked)[0] + " A bell hangs there.", "stop")
    assert script.main(arguments(server, tmp_path)) == 0
    index = load_index(expand_shards(out))
    for row, record in enumerate(lines(out / "000000.jsonl") + lines(out / "000001.jsonl")):
        assert read_sample(index, row).meta["captions"]["long"] == record["caption"]
        assert record["caption"].endswith("bell hangs there.") == (row < 2)
    assert not list(out.glob("*.journal"))


def test_a_server_may_ask_for_patience() -> None:
    import time
    from email.utils import formatdate

    assert (_pause("7"), _pause("1.5"), _pause("0"), _pause("-3"), _pause(""), _pause("soon")) == (7, 1.5, 0, 0, 0, 0)
    assert _pause("1e9") == _pause("inf") == 600 and _pause("nan") == 0
    assert 60 < _pause(formatdate(time.time() + 120, usegmt=True)) <= 120
    assert _pause(formatdate(time.time() - 120, usegmt=True)) == 0


def test_the_key_is_told_to_nobody_else(
    script: ModuleType,
    server: ChatServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shards_of(tmp_path / "in", 6, 6)
    server.key = "hush"
    server.faults = {2: (400, b'{"error": {"message": "Bearer hush may not do this"}}', 0)}
    monkeypatch.setenv("CAPTION_KEY", "hush\n")  # as read from a file
    assert script.main(arguments(server, tmp_path, "api_key_env=CAPTION_KEY")) == 0
    refused = [record for record in lines(tmp_path / "out" / "000000.jsonl") if record["caption"] is None]
    assert [record["rejected"][0]["text"] for record in refused] == ["status 400: Bearer *** may not do this"]
    assert not any("hush" in path.read_text("latin-1") for path in (tmp_path / "out").iterdir())
    assert "hush" not in "".join(capfd.readouterr())
    for key in ("two\nlines", "schlüssel"):
        monkeypatch.setenv("CAPTION_KEY", key)
        with pytest.raises(UserError, match="the key in CAPTION_KEY holds characters") as refusal:
            headers_of(Address(server.url, api_key_env="CAPTION_KEY"))
        assert key not in str(refusal.value)


def test_a_certificate_that_nobody_signed_is_told_at_once(script: ModuleType, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not here")
    made = tmp_path / "made.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2", "-keyout", str(made),
         "-out", str(tmp_path / "certificate.pem")], check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate.pem", made)
    shards_of(tmp_path / "in", 1, 1)
    with chat_server() as server, ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as secure:
        secure.socket = context.wrap_socket(secure.socket, server_side=True)
        secure.handle_error = lambda *_: None  # type: ignore[method-assign]  # a handshake that the client leaves
        threading.Thread(target=secure.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            server.url = f"https://localhost:{secure.server_address[1]}/v1"
            with pytest.raises(UserError, match="certificate of https://localhost.* is not trusted .*SSL_CERT_FILE"):
                script.main(arguments(server, tmp_path))
        finally:
            secure.shutdown()


def test_a_process_that_cannot_go_on_says_why_and_the_others_finish(server: ChatServer, tmp_path: Path) -> None:
    shards_of(tmp_path / "in", 8, 2)
    (tmp_path / "in" / "000001.tar").write_bytes(b"no tar at all" * 100)  # of the second process
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    result = subprocess.run(
        [*launcher, "scripts/caption.py", *arguments(server, tmp_path)], cwd=ROOT, env={**os.environ, "ACCELERATE_USE_CPU": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode != 0
    told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "process 1" in told[0] and "000001.tar" in told[0], result.stderr
    assert (tmp_path / "out" / "000002.tar").exists() and report(tmp_path)["shards_done"] == 2
