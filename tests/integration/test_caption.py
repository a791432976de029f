"""scripts/caption.py with tiny models of the real classes: shards in, shards with captions out, whatever happens between."""

from __future__ import annotations

import json
import signal
import subprocess
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from caption_runs import lines, same
from data_fixtures import encoded, picture, sample, shards_of
from programs import end, fork, script, two_ranks
from tiny_vlm import write_vlm

from paradiffusion.config import keys_of
from paradiffusion.curation.captioning.caption_options import CaptionOptions
from paradiffusion.data.index import load_index, read_sample
from paradiffusion.data.shards import expand_shards, write_shards
from paradiffusion.errors import UserError
from paradiffusion.metrics.local_vlm import LocalModel, SeededDraw
from paradiffusion.metrics.vlm import Answer, Decoding, Question

PASSING = ("language=any", "min_words=1", "reject=empty")  # random weights write no English
caption = script("caption").main


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vlm(tmp_path_factory.mktemp("vlm") / "tiny-qwen")


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
    assert (
        caption([*arguments, "max_new_tokens=16", "batch_size=4", "kind=dense", "prompts=paper,style", *PASSING]) == 0
    )
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


def test_a_rejected_caption_leaves_the_sample_as_it_was(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


@pytest.mark.parametrize("family", ["qwen3_vl", "llava", "gemma3", "internvl"])
def test_an_answer_does_not_depend_on_its_neighbours(family: str, tmp_path: Path) -> None:
    engine = LocalModel(str(write_vlm(tmp_path / family, family)), None, "auto", "cpu", 4, Decoding(16, 0.9))

    def ask(count: int, seed: int = 0, temperature: float = 0.7, image: int = 0) -> list[Answer]:
        questions = [
            Question(n, 0, picture(n + image, 64 + 16 * (n % 3), 64), "Say more" * (n + 1), n + seed, temperature)
            for n in range(count)
        ]
        return [answer for group in engine.answers(iter([questions])) for _, answer in group]

    together = ask(5)
    assert together[:2] == ask(2)
    assert ask(5, seed=100) != together
    greedy = ask(5, temperature=0)
    assert greedy == ask(5, seed=100, temperature=0) != together
    assert ask(5, temperature=0, image=50) != greedy  # another picture, another answer
    assert all(answer.tokens == 16 or answer.finished for answer in together)


def test_a_batch_that_does_not_fit_is_halved_without_keeping_its_inputs(
    vlm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_draws_follow_the_probabilities_that_the_model_gives(
    temperature: float, top_p: float, expected: list[float]
) -> None:
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
    with pytest.raises(UserError, match="made with temperature=0.7, and temperature=0"):
        caption([*arguments, "temperature=0"])
    with pytest.raises(UserError, match="made otherwise, and prompts"):
        caption([*arguments, "prompts=style"])
    assert caption([*arguments, "batch_size=1"]) == 0  # shards now, from the same captions
    assert load_index(expand_shards(tmp_path / "out")).words[:, 1].all()
    shards_of(tmp_path / "in", 3, 3)
    with pytest.raises(UserError, match="has changed since it was captioned"):
        caption(arguments)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("output=out", "shards= is missing"),
        ("shards=IN", "output= is missing"),
        ("shards=IN output=IN", "would be overwritten"),
        ("engine=vllm", "choose one of transformers, endpoint"),
        ("engine=endpoint", "needs endpoint="),
        ("served=x", "served= is for engine=endpoint"),
        ("engine=endpoint endpoint=http://x/v1 model=a/b", "model= is for engine=transformers"),
        ("engine=endpoint endpoint=http://x/v1 batch_size=2", "concurrency= says"),
        ("engine=endpoint endpoint=http://x:80x/v1", "is no address"),
        ("engine=endpoint endpoint=http://u:hush@x/v1", "the address of x .*api_key_env="),
        ("judge_share=0.5", "judge_share= needs judge="),
        ("output=IN/000000.tar/out", "is a file or lies under one"),
        ("output=OTHER", "holds 000000.tar and no settings.json"),
        ("model=TINY device=cuda:99", "device=cuda:99 cannot be used here"),
        ("model=qwen", "neither a folder, nor a hub id"),
        ("model=IN", "cannot be loaded"),
        ("model=nobody/nothing", "cannot be loaded"),
        ("reject=ugly", "check ugly is unknown"),
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
def test_a_wrong_request_is_told_in_a_sentence(
    vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("in", "other"):
        shards_of(tmp_path / folder, 1, 1)
    before = (tmp_path / "in" / "000000.tar").read_bytes()
    whole = [] if "is missing" in words else ["shards=IN", "output=out"]
    arguments = [*whole, *given.split()]
    for name, place in {"IN": tmp_path / "in", "OTHER": tmp_path / "other", "TINY": vlm}.items():
        arguments = [argument.replace(f"={name}", f"={place}") for argument in arguments]
    with pytest.raises(UserError, match=words) as refusal:
        caption(arguments)
    assert "hush" not in str(refusal.value) and (tmp_path / "in" / "000000.tar").read_bytes() == before
    assert not (tmp_path / "out").exists()


def test_help_names_every_key(command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    for key in keys_of(CaptionOptions):
        assert f"{key}=" in str(script("caption").__doc__)
    result = command("scripts/caption.py", "output=x")
    assert result.returncode == 2 and result.stderr.startswith("error: shards= is missing")
    assert "Traceback" not in result.stderr


def test_claims_of_lines_that_were_deleted_are_judged_again(arguments: list[str], vlm: Path, tmp_path: Path) -> None:
    shards_of(tmp_path / "in", 3)
    arguments += [f"judge={vlm}", "judge_share=1", *PASSING, "max_new_tokens=6", "device=cpu"]
    assert caption(arguments) == 0
    judged = tmp_path / "out" / "000000.judged.jsonl"
    judged.write_text('{"key": "of an older text"}\n')
    (tmp_path / "out" / "000000.jsonl").unlink()
    assert caption(arguments) == 0
    assert "of an older text" not in judged.read_text()
