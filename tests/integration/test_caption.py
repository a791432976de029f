"""scripts/caption.py: tiny models of the real classes, or a server that fails; shards in, shards with captions out, whatever happens."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chat_server import NAME, Asked, ChatServer, paragraph
from commands import user_error
from data_fixtures import encoded, picture, sample, shards_of
from programs import end, fork, script, two_ranks
from tiny_vlm import write_vlm

from paradiffusion.config import keys_of
from paradiffusion.curation.captioning.caption_options import CaptionOptions
from paradiffusion.data.index import load_index, read_sample
from paradiffusion.data.shards import expand_shards, write_shards
from paradiffusion.entry import run as run_program
from paradiffusion.errors import UserError
from paradiffusion.metrics.endpoint import _pause, key_of
from paradiffusion.metrics.local_vlm import LocalModel, SeededDraw
from paradiffusion.metrics.vlm import Answer, Decoding, Question, VlmOptions

PASSING = ("language=any", "min_words=1", "reject=empty")  # random weights write no English
caption = script("caption").main


@pytest.fixture
def arguments(vlm: Path, tmp_path: Path) -> list[str]:
    """What a run from ``in`` to ``out`` has."""
    return [f"shards={tmp_path / 'in'}", f"output={tmp_path / 'out'}", f"model={vlm}"]


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def test_shards_get_a_caption_and_keep_all_else(arguments: list[str], tmp_path: Path) -> None:
    shards_of(tmp_path / "in", 10, 6)
    out = tmp_path / "out"
    assert caption([*arguments, "max_new_tokens=16", "batch_size=4", "kind=dense", "prompts=paper,style", *PASSING]) == 0
    before, after = (load_index(expand_shards(tmp_path / name)) for name in ("in", "out"))
    assert after.kinds == ["short", "long", "dense"] and len(after) == 10
    records = lines(out / "000000.jsonl") + lines(out / "000001.jsonl")
    assert {record["template"] for record in records} == {"paper", "style"}
    for row, record in enumerate(records):
        old, new = read_sample(before, row), read_sample(after, row)
        assert (new.key, new.image, new.extension) == (record["key"], old.image, "png") and old.key == new.key
        assert new.meta["captions"].pop("dense") == record["caption"]
        source = new.meta.pop("caption_sources")["dense"]
        assert source == f"tiny-qwen@{record['revision']}, prompt {record['template']}"
        assert new.meta == old.meta
    assert len({record["caption"] for record in records}) > 5  # the pictures are looked at
    made = report(out)
    assert (made["captioned"], made["shards_done"], made["rejected_samples"]) == (10, 2, 0)
    assert made["captions_per_hour"] > 0 and made["captions_per_gpu_hour"] is None
    assert sum(made["bands"].values()) == pytest.approx(1)
    assert "| 100 to 150 | 0% | 51% |" in (out / "report.md").read_text()


def test_a_rejected_caption_leaves_the_sample_as_it_was(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards_of(tmp_path / "in", 6, 6)
    assert caption([*arguments, "max_new_tokens=12", "retries=2"]) == 0
    assert "rejected 100%" in capsys.readouterr().err  # told by the bar, not only in the end
    before, after = (load_index(expand_shards(tmp_path / name)) for name in ("in", "out"))
    assert [read_sample(after, row) for row in range(6)] == [read_sample(before, row) for row in range(6)]
    for record in lines(tmp_path / "out" / "000000.jsonl"):
        assert record["caption"] is None and all("too_short" in one["found"] for one in record["rejected"])
        assert len({one["template"] for one in record["rejected"]}) == 3  # each try with a template of its own
    made = report(tmp_path / "out")
    assert (made["answers"], made["rejected_answers"], made["rejected_samples"]) == (18, 1, 1)
    assert made["reasons"]["too_short"] == 18 and len(made["examples"]["too_short"]) == 3
    assert made["mean_words"] is None


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "internvl"])
def test_an_answer_does_not_depend_on_its_neighbours(family: str, tmp_path: Path) -> None:
    engine = LocalModel(str(write_vlm(tmp_path / family, family)), None, "auto", "cpu", 4, Decoding(16, 0.9))

    def ask(count: int, seed: int = 0, temperature: float = 0.7, image: int = 0) -> list[Answer]:
        questions = [
            Question(n, 0, picture(n + image, 64 + 16 * (n % 3), 64), "Say more" * (n + 1), n + seed, temperature) for n in range(count)
        ]
        return [answer for group in engine.answers(iter([questions])) for _, answer in group]

    together = ask(5)
    assert together[:2] == ask(2)
    assert ask(5, seed=100) != together
    greedy = ask(5, temperature=0)
    assert greedy == ask(5, seed=100, temperature=0) != together
    assert ask(5, temperature=0, image=50) != greedy  # another picture, another answer
    assert all(answer.tokens == 16 or answer.finished for answer in together)


def test_a_batch_that_does_not_fit_is_halved_without_keeping_its_inputs(vlm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LocalModel(str(vlm), None, "bfloat16", "cpu", 4, Decoding(8))
    questions = [Question(n, 0, picture(n, 64, 64), "Say more", n, 0.7) for n in range(4)]
    answers = list(engine.answers(iter([questions])))
    failed: list[weakref.ref[torch.Tensor]] = []
    generate = engine._network.generate

    def small(**inputs: Any) -> Any:
        assert not [one for one in failed if one() is not None], "the inputs that did not fit are still held"
        if len(inputs["input_ids"]) > 1:
            failed.append(weakref.ref(inputs["pixel_values"]))
            raise torch.OutOfMemoryError
        return generate(**inputs)

    monkeypatch.setattr(engine._network, "generate", small)
    assert [len(group) for group in engine.answers(iter([questions]))] == [4] == [len(answers[0])]
    assert len(failed) == 3
    monkeypatch.setattr(engine, "_generate", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(UserError, match="does not hold .* one picture"):
        list(engine.answers(iter([questions[:1]])))


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [(1.0, 1.0, [0.5, 0.3, 0.15, 0.05]), (1.0, 0.9, [0.526, 0.316, 0.158, 0]), (0.5, 1.0, [0.685, 0.247, 0.062, 0.007])],
)  # fmt: skip
def test_draws_follow_the_probabilities_that_the_model_gives(temperature: float, top_p: float, expected: list[float]) -> None:
    scores = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    draw = SeededDraw(list(range(4000)), temperature, top_p, torch.device("cpu"))
    drawn = draw(torch.zeros(4000, 1, dtype=torch.long), scores.expand(4000, 4)).argmax(1)
    share = torch.bincount(drawn, minlength=4) / 4000
    assert torch.allclose(share, torch.tensor(expected), atol=0.03)


def test_a_killed_captioner_goes_on_after_its_last_line(vlm: Path, tmp_path: Path) -> None:
    shards_of(tmp_path / "in", 18, 18)
    common = [f"shards={tmp_path / 'in'}", f"model={vlm}", "max_new_tokens=32", "batch_size=3", "retries=1", "language=any",
              "min_words=6", "reject=too_short"]  # fmt: skip
    killed, journal = tmp_path / "killed", tmp_path / "killed" / "000000.journal"
    child = fork("caption", [*common, f"output={killed}"], tmp_path / "said.txt")
    assert end(child, lambda: journal.is_file() and journal.read_bytes().count(b"\n") >= 6) == -signal.SIGKILL
    left = journal.read_bytes()
    assert not list(killed.glob("*.tar")), "it was to be killed in the middle"
    # Torn in the middle of a batch and of a line, as a machine that loses its power does.
    journal.write_bytes(b"\n".join(left.split(b"\n")[:5]) + b'\n{"row": 3')
    assert caption([*common, f"output={killed}"]) == 0
    assert caption([*common, f"output={tmp_path / 'whole'}"]) == 0
    same(killed, tmp_path / "whole")
    records = lines(killed / "000000.jsonl")
    assert any(record["rejected"] for record in records) and any(record["caption"] for record in records)
    stamps = {path.name: path.stat().st_mtime_ns for path in killed.glob("0*")}
    assert caption([*common, f"output={killed}"]) == 0  # nothing is left to do
    assert stamps == {path.name: path.stat().st_mtime_ns for path in killed.glob("0*")}


def test_two_processes_share_the_shards(vlm: Path, tmp_path: Path) -> None:
    shards_of(tmp_path / "in", 10, 2)
    common = [f"shards={tmp_path / 'in'}", f"model={vlm}", "max_new_tokens=16", *PASSING]
    codes, said = two_ranks("caption", [*common, f"output={tmp_path / 'two'}"], tmp_path)
    assert codes == [0, 0], said
    assert "".join(said).count("5 of 5 shards: 10 captions") == 1
    assert caption([*common, f"output={tmp_path / 'one'}"]) == 0
    same(tmp_path / "one", tmp_path / "two")
    made = report(tmp_path / "two")
    assert (made["processes"], made["answers"], made["shards_done"]) == (2, 10, 5)  # nothing was asked twice


def test_pictures_that_do_not_decode_are_counted_and_kept(arguments: list[str], tmp_path: Path) -> None:
    samples = [sample(number) for number in range(5)]
    samples[1].image = samples[1].image[:60]
    samples[3].image = encoded(picture(3, 1, 600))  # beyond the processor's aspect limit
    write_shards(samples, tmp_path / "in", 5)
    assert caption([*arguments, "max_new_tokens=8", *PASSING]) == 0
    records = lines(tmp_path / "out" / "000000.jsonl")
    assert [record["caption"] is None for record in records] == [False, True, False, True, False]
    assert [record["rejected"][0]["found"] for record in (records[1], records[3])] == [["unreadable"]] * 2
    assert "aspect ratio" in records[3]["rejected"][0]["text"]
    index = load_index(expand_shards(tmp_path / "out"))
    assert [read_sample(index, row).image for row in range(5)] == [one.image for one in samples]
    assert report(tmp_path / "out")["reasons"] == {"unreadable": 2}


def test_what_the_captions_depend_on_may_not_change(arguments: list[str], tmp_path: Path) -> None:
    shards_of(tmp_path / "in", 2, 2)
    arguments += ["max_new_tokens=4", *PASSING]
    assert caption([*arguments, "write=jsonl"]) == 0
    assert not (tmp_path / "out" / "000000.tar").exists()
    user_error("made with temperature=0.7, and temperature=0", caption, [*arguments, "temperature=0"])
    user_error("made otherwise, and prompts", caption, [*arguments, "prompts=style"])
    assert caption([*arguments, "batch_size=1"]) == 0  # shards now, from the same captions
    assert load_index(expand_shards(tmp_path / "out")).words[:, 1].all()
    shards_of(tmp_path / "in", 3, 3)
    user_error("has changed since it was captioned", caption, arguments)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("output=out", "shards= is missing"),
        ("shards=IN", "output= is missing"),
        ("shards=IN output=IN", "would be overwritten"),
        ("engine=tgi", "choose one of transformers, vllm, endpoint"),
        ("engine=vllm batch_size=2", "concurrency= says"),
        ("concurrency=2", "concurrency= is for engine=endpoint or vllm"),
        ("runner=ray runner_options={worker:2}", "is not understood; expected runner_options="),
        ("runner_options={workers:2}", "runner_options= are for runner=ray"),
        ("engine=endpoint", "needs endpoint="),
        ("served=x", "served= is for engine=endpoint"),
        ("engine=endpoint endpoint=http://x/v1 model=a/b", "model= is for engine=transformers"),
        ("engine=endpoint endpoint=http://x/v1 batch_size=2", "concurrency= says"),
        ("engine=endpoint endpoint=http://x:80x/v1", "is no address"),
        ("engine=endpoint endpoint=http://u:hush@x/v1", "the address of x .*api_key_env="),
        ("judge_share=0.5", "judge_share= needs judge="),
        ("output=s3://bucket/out", "is an address, and results are written to a folder"),
        ("output=IN/000000.tar/out", "is a file or lies under one"),
        ("output=OTHER", "holds 000000.tar and no settings.json"),
        ("model=TINY device=cuda:99", "device=cuda:99 is not to be had here"),
        ("model=qwen", "neither a folder, nor a hub id"),
        ("model=IN", "cannot be loaded"),
        ("model=nobody/nothing", "cannot be loaded"),
        ("reject=ugly", "reject=ugly is unknown"),
        ("prompts=x", "choose among paper"),
        ("prompt_file=none.yaml", "cannot be read"),
        ("kind=../x", "no name for a caption kind"),
        ("kind=clean", "no template"),
        ("min_words=6 max_words=3", "swap them"),
        ("top_p=1.5", "top_p=1.5"),
        ("shards=nowhere", "matches no .tar"),
        ("batch_size=many", "batch_size"),
    ],
)
def test_a_wrong_request_is_told_in_a_sentence(vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("in", "other"):
        shards_of(tmp_path / folder, 1, 1)
    before = (tmp_path / "in" / "000000.tar").read_bytes()
    whole = [] if "is missing" in words else ["shards=IN", "output=out"]
    arguments = [*whole, *given.split()]
    for name, place in {"IN": tmp_path / "in", "OTHER": tmp_path / "other", "TINY": vlm}.items():
        arguments = [argument.replace(f"={name}", f"={place}") for argument in arguments]
    refusal = user_error(words, caption, arguments)
    assert "hush" not in refusal and (tmp_path / "in" / "000000.tar").read_bytes() == before
    assert not (tmp_path / "out").exists()


def test_help_names_every_key() -> None:
    for key in keys_of(CaptionOptions):
        assert f"{key}=" in str(script("caption").__doc__)


def test_vllm_answers_many_questions_at_once(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its calls, on a stand-in: there is no GPU for the real one."""
    batches: list[list[tuple[tuple[int, int], str, float, int]]] = []

    class Stand:
        def __init__(self, source: str, **given: Any) -> None:
            assert source == arguments[2].partition("=")[2] and given["max_num_seqs"] == 4 and not given["trust_remote_code"]

        def chat(self, messages: list[Any], draws: list[Any], use_tqdm: bool) -> list[Any]:
            batches.append([])
            for (message,), draw in zip(messages, draws, strict=True):
                image, text = message["content"]
                batches[-1].append((image["image_pil"].size, text["text"], draw.temperature, draw.seed))
            said = [("Cut in the", "length") if max(image) > 90 else ("It stops.", "stop") for image, *_ in batches[-1]]
            return [SimpleNamespace(outputs=[SimpleNamespace(text=text, token_ids=[1], finish_reason=end)]) for text, end in said]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Stand, SamplingParams=SimpleNamespace))
    shards_of(tmp_path / "in", 6, 6)
    vllm = [*arguments, "engine=vllm", "concurrency=4", "temperature=0", "retries=0", *PASSING[:2], "reject=cut"]
    assert caption(vllm) == 0
    assert [len(batch) for batch in batches] == [4, 2] and {draw for batch in batches for *_, draw, _ in batch} == {0}
    assert len({seed for batch in batches for *_, seed in batch}) == 6
    found = [record["caption"] for record in lines(tmp_path / "out" / "000000.jsonl")]
    assert found.count("It stops.") == 3 and found.count(None) == 3
    user_error("engine=vllm", caption, [*arguments, "temperature=0", "retries=0", *PASSING[:2], "reject=cut"])

    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(sys, "argv", ["caption.py", *vllm, f"output={tmp_path / 'other'}"])
    with pytest.raises(SystemExit) as ended:
        run_program(caption)
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and "the module vllm is not installed and belongs to the extra vllm" in said[-1]


def test_claims_of_lines_that_were_deleted_are_judged_again(arguments: list[str], vlm: Path, tmp_path: Path) -> None:
    shards_of(tmp_path / "in", 3)
    arguments += [f"judge={vlm}", "judge_share=1", *PASSING, "max_new_tokens=6", "device=cpu"]
    assert caption(arguments) == 0
    judged = tmp_path / "out" / "000000.judged.jsonl"
    judged.write_text('{"key": "of an older text"}\n')
    (tmp_path / "out" / "000000.jsonl").unlink()
    assert caption(arguments) == 0
    assert "of an older text" not in judged.read_text()


REFUSAL = "I'm sorry, but I can't help with that."
Run = Callable[..., int]


@pytest.fixture
def run(server: ChatServer, tmp_path: Path) -> Run:
    """``run("timeout=1", output="again")``: the captioner on ``in`` with this server."""
    return lambda *more, output="out": script("caption").main(asking(server, tmp_path, *more, output=output))


def asking(server: ChatServer, folder: Path, *more: str, output: str = "out") -> list[str]:
    return [f"shards={folder / 'in'}", f"output={folder / output}", "engine=endpoint", f"endpoint={server.url}",
            "retry_wait=0.02", "concurrency=4", *more]  # fmt: skip


def test_failures_that_pass_change_nothing(run: Run, server: ChatServer, tmp_path: Path) -> None:
    shards_of(tmp_path / "in", 12, 8)
    assert run(output="smooth") == 0
    server.asked.clear()
    server.faults = {
        0: (429, b'{"error": {"message": "slow down"}}', 0),
        1: (500, b"<html>oops</html>", 0),
        2: (200, b'{"choices": [{"mess', 0),
        3: (200, b'{"choices": []}', 0),
        4: (524, b"<html>a proxy's time is over</html>", 0),
        5: (200, json.dumps({"choices": [{"message": {"content": {"a": 1}}}]}).encode(), 0),
        6: (200, b"[" * 100_000, 0),
        7: (200, b"[1]", 0),
        8: (200, b"", 1.5),  # longer than the time-out
        9: (200, b'{"choices": [{"message": {"content": "A dog."}}], "usage": {"completion_tokens": 1e999}}', 0),
    }
    assert run("timeout=1", "concurrency=3") == 0
    same(tmp_path / "smooth", tmp_path / "out")
    assert len(server.asked) == 12 + 10 and server.most_at_once <= 4  # one that timed out may still be sleeping there
    index = load_index(expand_shards(tmp_path / "out"))
    assert index.kinds == ["short", "long"] and (index.words[:, 1] > 50).all()
    made = report(tmp_path / "out")
    assert made["captioned"] == 12 and made["captions_per_hour"] > 0 and made["captions_per_gpu_hour"] is None
    assert made["models"] == [f"{NAME}@served"]


def test_an_answer_may_come_in_parts(run: Run, server: ChatServer, tmp_path: Path) -> None:
    shards_of(tmp_path / "in", 1, 1)
    parts = [{"type": "text", "text": text} for text in (paragraph(b"a"), " And ", paragraph(b"b"))]
    server.faults = {0: (200, json.dumps({"choices": [{"message": {"content": parts}}]}).encode(), 0)}
    assert run() == 0 and len(server.asked) == 1
    assert lines(tmp_path / "out" / "000000.jsonl")[0]["caption"] == f"{paragraph(b'a')} And {paragraph(b'b')}"


def test_a_request_is_what_the_protocol_says(run: Run, server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards_of(tmp_path / "in", 4, 4)
    server.key = "secret"
    monkeypatch.setenv("CAPTION_KEY", "secret")
    monkeypatch.setenv("OPENAI_ORG_ID", "of another server")
    monkeypatch.setenv("OPENAI_API_KEY", "of another server")
    more = ("api_key_env=CAPTION_KEY", "image_side=48", "max_new_tokens=200", "temperature=0.5", "endpoint_gpus=2")
    assert run(*more) == 0
    assert sorted(asked.size() for asked in server.asked) == [(28, 48), (48, 28), (48, 38), (48, 48)]
    asked = server.asked[0]
    headers = {name.lower(): value for name, value in asked.headers.items()}
    assert headers["authorization"] == "Bearer secret"
    assert (asked.body["max_tokens"], asked.body["temperature"], asked.body["model"]) == (200, 0.5, NAME)
    assert len({one.body["seed"] for one in server.asked}) == 4
    assert not headers.keys() & {"openai-organization", "openai-project"}, "what another server is told"
    made = report(tmp_path / "out")
    assert made["captions_per_gpu_hour"] == pytest.approx(made["captions_per_hour"] / 2)


def test_a_rejected_answer_is_asked_for_in_other_words(run: Run, server: ChatServer, tmp_path: Path) -> None:
    shards_of(tmp_path / "in", 40, 40)

    def answer(asked: Asked) -> tuple[str, str]:
        said = paragraph(asked.image + asked.prompt.encode())
        if "how the view was made" in asked.prompt:
            return REFUSAL, "stop"
        if "laid out" in asked.prompt:
            return said[:-30], "length"  # trimmed to its last sentence
        return "The image shows a" + said[1:], "stop"

    server.answer = answer
    assert run() == 0
    records = lines(tmp_path / "out" / "000000.jsonl")
    again = [record for record in records if record["rejected"]]
    assert 2 < len(again) < 20 and len(server.asked) == 40 + len(again)
    assert all(record["rejected"][0]["template"] == "style" != record["template"] for record in again)
    assert all(record["caption"] and not record["found"] for record in records)
    made = report(tmp_path / "out")
    assert made["reasons"] == {"too_short": len(again), "refusal": len(again)} and made["rejected_samples"] == 0
    assert made["templates"]["style"]["rejected"] == 1 and made["templates"]["paper"]["rejected"] == 0
    assert made["notes"]["trimmed"] == sum(record["template"] == "spatial" for record in records)
    assert made["notes"]["opening_removed"] == sum(record["template"] == "paper" for record in records)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| refusal |" in text and "- refusal, 000000/" in text


def test_a_retry_in_the_same_words_draws_anew(run: Run, server: ChatServer, tmp_path: Path) -> None:
    shards_of(tmp_path / "in", 1, 1)
    server.answer = lambda asked: (REFUSAL, "stop")
    assert run("prompts=paper", "retries=2", "temperature=0") == 0
    assert [asked.body["temperature"] for asked in server.asked] == [0, 0.7, 0.7]
    assert len({asked.body["seed"] for asked in server.asked}) == 3
    assert report(tmp_path / "out")["rejected_samples"] == 1


def test_a_signal_stops_it_and_the_same_command_goes_on(
    run: Run, server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards_of(tmp_path / "in", 24, 12)
    plain = server.answer

    def interrupting(asked: Asked) -> tuple[str, str]:
        if len(server.asked) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(asked)

    server.answer = interrupting
    assert run() == 128 + signal.SIGTERM
    assert "stopped; run the same command again" in capsys.readouterr().out
    kept = (tmp_path / "out" / "000000.journal").read_text().count("\n")
    assert 0 < kept < 24 and not list((tmp_path / "out").glob("*.tar"))
    server.answer = plain
    server.asked.clear()
    assert run() == 0
    assert len(server.asked) == 24 - kept  # nothing that was answered is asked again
    assert run(output="whole") == 0
    same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize(
    ("more", "change", "words"),
    [
        ((), {"models": ["a", "b"]}, "serves a, b; name one with served="),
        (("served=other",), {}, "served=other is not served at"),
        (("endpoint=localhost:8000",), {}, "is no address"),
        (("endpoint=http://127.0.0.1:9/v1",), {}, "failed 3 times .*onnect"),
        ((), {"key": "secret"}, "refuses requests without a key"),
        (("api_key_env=NO_SUCH_KEY",), {}, "names an environment variable that is not set"),
        (("api_key_env=PATH",), {"key": "secret"}, "refuses the key in PATH"),
        (("tries=2",), {"faults": dict.fromkeys(range(50), (503, b'{"message": "no room"}', 0))}, "failed 2 times .*no room.*goes on"),
        (("tries=2", "timeout=0.3"), {"faults": dict.fromkeys(range(50), (200, b"", 1.0))}, "no answer within 0.3 s"),
        (("tries=2",), {"faults": dict.fromkeys(range(50), (200, b"{}", 0))}, "no chat completion"),
        ((), {"faults": dict.fromkeys(range(50), (400, b'{"error": {"message": "no multimodal input"}}', 0))}, "refused the first 1. pictures .*no multimodal input"),
        ((), {"faults": {3: (404, b'{"detail": "Not Found"}', 0)}}, "does not answer at /v1/chat/completions .*Not Found.*ends in /v1"),
        ((), {"faults": {3: (307, b"", 0)}}, "status 307"),
    ],
)  # fmt: skip
def test_what_does_not_pass_is_told_in_a_sentence(
    run: Run, server: ChatServer, tmp_path: Path, more: tuple[str, ...], change: dict[str, Any], words: str
) -> None:
    shards_of(tmp_path / "in", 20, 20)
    for name, value in change.items():
        setattr(server, name, value)
    user_error(words, run, *more)


def test_claims_are_checked_by_a_second_model(run: Run, server: ChatServer, tmp_path: Path) -> None:
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
    assert run(*more) == 0
    judged = report(tmp_path / "out")["judged"]
    captions = judged["captions"]
    assert 8 <= captions <= 22 and judged["claims"] == captions * 8
    # Of the eight sentences of each caption one has a lamp, and one a clock.
    assert (judged["confirmed"], judged["unclear"]) == (captions * 6, captions)
    assert judged["share"] == pytest.approx(6 / 7)
    low, high = judged["interval"]
    assert 0.7 < low < 6 / 7 < high < 0.95
    assert len(judged["unconfirmed"]) == captions and all(" lamp " in one["text"] for one in judged["unconfirmed"])
    asked = len(server.asked)
    assert run(*more) == 0 and len(server.asked) == asked
    for key, value, was in (("judge", "tiny-vlm", "judge"), ("judge_share", "0.9", "0.5")):
        told = f"claims .* with {key}={was}, and {key}={value} is asked for; delete judge.json"
        user_error(told, run, *more, f"{key}={value}")
    for path in (tmp_path / "out").glob("*judge*"):
        path.unlink()
    assert run(*more, "judge_share=1") == 0
    assert report(tmp_path / "out")["judged"]["captions"] == 30


def test_two_captioners_do_not_write_one_shard(run: Run, tmp_path: Path) -> None:
    shards_of(tmp_path / "in", 2, 2)
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / "000000.journal", "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        user_error("another process is at work", run)


def test_a_server_that_wants_to_be_paid_rejects_no_picture(run: Run, server: ChatServer, tmp_path: Path) -> None:
    shards_of(tmp_path / "in", 8, 8)
    server.faults = dict.fromkeys(range(4, 50), (402, b'{"error": {"message": "insufficient credits"}}', 0))
    user_error("402: insufficient credits", run)
    server.faults = {}
    shutil.copytree(tmp_path / "out", tmp_path / "stopped")
    assert run() == 0 and report(tmp_path / "out")["captioned"] == 8
    # Answers do not go to the pictures of a shard that was changed meanwhile.
    turned = [read_sample(load_index([tmp_path / "in" / "000000.tar"]), row) for row in range(7, -1, -1)]
    shutil.rmtree(tmp_path / "in")
    write_shards(turned, tmp_path / "in", 8)
    user_error("has changed since its captions were begun", run, output="stopped")


def test_a_shard_whose_lines_were_deleted_is_written_again(run: Run, server: ChatServer, tmp_path: Path) -> None:
    shards_of(tmp_path / "in", 4, 2)
    assert run() == 0
    out, plain = tmp_path / "out", server.answer
    (out / "000000.jsonl").unlink()
    # As a kill leaves it that comes between the lines and the end of the journal.
    (out / "000001.journal").write_bytes(b"")
    server.answer = lambda asked: (plain(asked)[0] + " A bell hangs there.", "stop")
    assert run() == 0
    index = load_index(expand_shards(out))
    for row, record in enumerate(lines(out / "000000.jsonl") + lines(out / "000001.jsonl")):
        assert read_sample(index, row).meta["captions"]["long"] == record["caption"]
        assert record["caption"].endswith("bell hangs there.") == (row < 2)
    assert not list(out.glob("*.journal"))


def test_a_server_may_ask_for_patience(run: Run, server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [_pause(text) for text in ("7", "1.5", "-3", "", "soon", "1e9", "nan")] == [7, 1.5, 0, 0, 0, 600, 0]
    assert 60 < _pause(formatdate(time.time() + 120, usegmt=True)) <= 120
    assert _pause(formatdate(time.time() - 120, usegmt=True)) == 0
    shards_of(tmp_path / "in", 1, 1)
    server.faults, server.retry_after = {0: (429, b"{}", 0)}, "7"
    pauses, sleep = [], asyncio.sleep

    async def noted(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", noted)
    assert run() == 0 and pauses == [7.0] and len(server.asked) == 2


def test_a_refused_picture_is_counted_and_the_key_is_told_to_nobody(
    run: Run, server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shards_of(tmp_path / "in", 6, 6)
    server.key = "hush"
    server.faults = {2: (400, b'{"error": {"message": "Bearer hush may not do this"}}', 0)}
    monkeypatch.setenv("CAPTION_KEY", "hush\n")  # as read from a file
    assert run("api_key_env=CAPTION_KEY") == 0 and len(server.asked) == 6  # it is not asked again
    refused = [record for record in lines(tmp_path / "out" / "000000.jsonl") if record["caption"] is None]
    assert [record["rejected"][0]["text"] for record in refused] == ["status 400: Bearer *** may not do this"]
    assert not any("hush" in path.read_text("latin-1") for path in (tmp_path / "out").iterdir())
    assert "hush" not in "".join(capfd.readouterr())
    for key in ("two\nlines", "schlüssel"):
        monkeypatch.setenv("CAPTION_KEY", key)
        with pytest.raises(UserError, match="the key in CAPTION_KEY holds characters") as refusal:
            key_of(VlmOptions(api_key_env="CAPTION_KEY"))
        assert key not in str(refusal.value)


def test_a_certificate_that_nobody_signed_is_told_at_once(run: Run, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not here")
    made, certificate = tmp_path / "made.pem", tmp_path / "certificate.pem"
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    subprocess.run([*request, "-keyout", str(made), "-out", str(certificate)], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, made)
    shards_of(tmp_path / "in", 1, 1)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as secure:
        secure.socket = context.wrap_socket(secure.socket, server_side=True)
        secure.handle_error = lambda *_: None  # type: ignore[method-assign]  # a handshake that the client leaves
        threading.Thread(target=secure.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            with pytest.raises(UserError, match="certificate of https://localhost.* is not trusted .*SSL_CERT_FILE"):
                run(f"endpoint=https://localhost:{secure.server_address[1]}/v1")
        finally:
            secure.shutdown()


def test_a_process_that_cannot_go_on_says_why_and_the_others_finish(server: ChatServer, tmp_path: Path) -> None:
    shards_of(tmp_path / "in", 8, 2)
    (tmp_path / "in" / "000001.tar").write_bytes(b"no tar at all" * 100)  # of the second process
    codes, said = two_ranks("caption", asking(server, tmp_path), tmp_path)
    assert any(codes), said
    told = [line for line in "".join(said).splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "process 1" in told[0] and "000001.tar" in told[0], said
    assert (tmp_path / "out" / "000002.tar").exists() and report(tmp_path / "out")["shards_done"] == 2


LINES = ("seconds",)  # of a line, what differs from run to run


def lines(path: Path) -> list[dict[str, Any]]:
    """A shard's lines without what no two runs share."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [{key: value for key, value in line.items() if key not in LINES} for line in found]


def same(one: Path, other: Path) -> None:
    """Both folders hold the same shards, byte by byte, and the same lines."""
    names = sorted(path.name for path in one.glob("*.tar"))
    assert names and names == sorted(path.name for path in other.glob("*.tar"))
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes()
        stem = name.removesuffix(".tar")
        assert lines(one / f"{stem}.jsonl") == lines(other / f"{stem}.jsonl")
    assert not [path for folder in (one, other) for path in folder.iterdir() if "journal" in path.name]
