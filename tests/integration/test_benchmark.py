"""scripts/benchmark*.py: the paper's arm at the smallest size, timing and its words; ways of reading in turns."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from commands import user_error
from peft.tuners.tuners_utils import BaseTunerLayer

from paradiffusion.budget.bench_cache import benchmark_cache
from paradiffusion.budget.bench_loader import LoaderBench, benchmark_loader, padding, run_way
from paradiffusion.budget.bench_models import SWITCHES, Bench, Row, Timing, interleave, make_row, parse_settings, ratio
from paradiffusion.budget.bench_plan import benchmark_plan
from paradiffusion.budget.benchmark import HEADER, benchmark, cells, changing, described_gib, own_step, plain_step, start, take_batches
from paradiffusion.budget.describe import Question, describe
from paradiffusion.budget.synthetic import captions, random_models
from paradiffusion.compose import compose_train
from paradiffusion.errors import UserError
from paradiffusion.sampling.pipeline import InferenceModels, Job, draw
from paradiffusion.text.sources import locate
from paradiffusion.training import trainer as module
from paradiffusion.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture
def small(codec_folder: Path) -> list[str]:
    """The paper's arm with tiny models."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return [
        "preset=paper", "unet=tiny", "text_encoder=tiny", f"codec.path={codec_folder}", "codec.scaling_factor=null",
        "data.bucket_multiple=16",
        "batch_size=2", "micro_batch_size=2", "conditioning.max_tokens=64", "threads=1", "gradient_checkpointing=false",
    ]  # fmt: skip


SHORT = ["device=cpu", "resolution=64", "repeats=1", "warmup=1", "steps=2"]


def bench_of(*overrides: str, folder: Path = Path("unused")) -> Bench:
    return Bench(parse_settings(SHORT)[0], list(overrides), folder)


def test_everything_is_measured_and_written(small: list[str], tmp_path: Path) -> None:
    stem, rows = benchmark([*SHORT, *small, f"output={tmp_path / 'out'}", "stages=1,2"])
    assert stem == tmp_path / "out" / "paper_cpu"
    document = json.loads(stem.with_suffix(".json").read_text())
    assert len(document["rows"]) == len(rows)
    assert document["machine"]["threads"] == 1 and document["machine"]["torch"]
    assert str(tmp_path) not in document["command"]
    assert stem.with_suffix(".md").read_text().count("\n| ") == len(rows) + 2
    for row in rows:
        assert row.median is not None and row.median > 0 and row.rate is not None, row
        assert row.low is not None and row.high is not None and row.low <= row.median <= row.high
        if row.work.startswith("ours") and row.against == "reference":
            assert row.speedup is not None and row.speedup > 0
    # conditioning is given by the user: one arm, and each kind of work beside the reference
    assert {row.arm for row in rows} == {"as given"}
    works = {key: {row.work for row in rows if (row.what, row.stage) == key} for key in {(r.what, r.stage) for r in rows}}
    assert works["step", 1] == {"ours", "features and latents given", "reference", "ours, channels_last=true"}
    assert "reference" in works["step", 2] and "features and latents given" not in works["step", 2]
    drawn = [row for row in rows if row.what == "sampler"]
    assert {row.note.split(",")[0] for row in drawn} == {"batch 1", "batch 8"}
    assert {"ours, sampler=paper", "ours, sampler=fast", "reference"} == {row.work for row in drawn}
    assert {row.work for row in rows if row.what == "text"} == {"ours", "reference"}


def test_pictures_are_drawn_compiled_beside_not(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[bool] = []

    def drawn(models: InferenceModels, jobs: list[Job]) -> object:
        runs.append(models.joint.unet._compiled_call_impl is not None)
        return draw(models, jobs)

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr("paradiffusion.budget.benchmark.draw", drawn)
    _, rows = benchmark([*SHORT, *small, f"output={tmp_path}", "what=sampler", "switches=compile"])
    found = [row for row in rows if row.work == "ours, sampler=paper, compile=true"]
    assert [row.note.split(",")[0] for row in found] == ["batch 1", "batch 8"]
    assert all(row.median for row in found) and {"ours, sampler=paper", "reference"} <= {row.work for row in rows}
    assert (runs.count(True), runs.count(False)) == (4, 8)  # two rounds of two sizes: one way of three is compiled


def test_designs_are_measured_undone(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways, saved = [], []
    train_step, save = Trainer.train_step, module.save_checkpoint

    def stepped(trainer: Trainer, *given: object) -> object:
        adapters = [m.cast_input_dtype_enabled for m in trainer.joint.modules() if isinstance(m, BaseTunerLayer)]
        frozen = [p.dtype for p in trainer.joint.unet.parameters() if not p.requires_grad and p.ndim > 1]
        ways.append((any(adapters), all(dtype == torch.float32 for dtype in frozen), torch.backends.cudnn.benchmark))
        return train_step(trainer, *given)  # type: ignore[arg-type]

    def taken(*given: object) -> object:
        saved.append(given[-1])
        return save(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "train_step", stepped)
    monkeypatch.setattr(module, "save_checkpoint", taken)
    switches = "switches=reads,null_prompt,adapter_casts,frozen_fp32,cudnn_benchmark,async_save"
    arguments = [f"output={tmp_path}", "what=step", "stages=2", switches, "precision=bf16", "unet.lora_rank=2"]
    _, rows = benchmark([*SHORT, *small, *arguments])
    assert set(ways) == {(False, False, True), (True, False, True), (False, True, True), (False, False, False)}
    assert ways[-1] == ways[0]  # the last switch finds the step as the first did
    assert sorted(saved) == [False, False, True, True]
    found = {row.work: row for row in rows}
    undone = [row for work, row in found.items() if work.removeprefix("ours, ") in [*SWITCHES.values()][-5:]]
    assert len(undone) == 5 and all(row.speedup and row.against == "ours" for row in undone)
    waited, beside = (found[f"ours, a checkpoint, async_save={apart}"] for apart in ("false", "true"))
    assert beside.against == waited.work and beside.speedup and "GB" in beside.note
    assert {"ours", "latents given", "reference"} <= found.keys()


def test_a_rows_peak_stands_beside_what_describe_says(small: list[str]) -> None:
    arguments = [*small, "stage=1", "data.shards=unused"]
    said = describe([*arguments, "conditioning.max_tokens=32"], Question(gpus=1)).memory[0]
    described = described_gib(compose_train(arguments), 32)
    assert described == pytest.approx((said.total - said.context) / 2**30)
    row = replace(make_row({"ours": Timing([1.0], 1.5, 1.8)}, "ours", 1), described_gib=1.4)
    shown = dict(zip(HEADER, cells(row), strict=True))
    assert (shown["peak GiB (describe's)"], shown["reserved GiB"]) == ("1.5 (1.4)", "1.8")


def test_ours_and_the_reference_train_the_same_weights(small: list[str], tmp_path: Path) -> None:
    bench = bench_of(*small, folder=tmp_path)
    config = bench.config(2, [])
    bench.write_data(64)
    setup = start(bench, config)
    batches = take_batches(setup, 0, 2)
    lengths = [sum(map(len, batch.captions)) for batch in take_batches(setup, 1, 3)]
    assert lengths[0] == lengths[1] < lengths[2] < lengths[3]  # what warms up is measured too, short to long
    trained = setup.joint.trained()
    assert any(name.startswith("text_encoder.") for name in trained)
    for step in (own_step(setup, batches), plain_step(setup, batches)):
        before = {name: p.detach().clone() for name, p in trained.items()}
        frozen = [p.detach().clone() for p in setup.codec.parameters()]
        step(0)
        step(1)
        moved = [name for name, p in trained.items() if not torch.equal(p, before[name])]
        assert len(moved) == len(trained)
        assert all(p.grad is None or not p.grad.any() for p in trained.values())
        assert all(torch.equal(p, q) for p, q in zip(setup.codec.parameters(), frozen, strict=True))
    setup.close()


def test_compiling_takes_the_language_model_along(small: list[str], tmp_path: Path) -> None:
    bench = bench_of(*small, folder=tmp_path)
    bench.write_data(64)
    setup = start(bench, bench.config(1, []))
    layer = next(m for m in setup.encoder.model.modules() if type(m).__name__.endswith("DecoderLayer"))
    switch = changing(setup, "compile")
    for is_compiled in (True, False, True):
        switch(is_compiled)
        assert [m._compiled_call_impl is not None for m in (setup.joint.unet, layer)] == [is_compiled] * 2
    setup.close()


def test_random_models_of_few_bits_are_refused(small: list[str]) -> None:
    for kind, said in (("4bit", "random weights"), ("fp8", "CUDA device")):
        with pytest.raises(UserError, match=f"{said}.*quantization=null|quantization.*{said}"):
            random_models(compose_train(["data.shards=unused", *small, f"text_encoder.quantization={kind}"]), CPU)


def test_captions_have_the_papers_lengths() -> None:
    for kind, words in (("short", 11.8), ("long", 132.9), ("clean", 70.6)):
        lengths = [len(text.split()) for text in captions(kind, 400)]
        assert abs(sum(lengths) / 400 - words) < 0.05 * words + 0.5
        assert len(set(lengths)) > 5
    assert captions("long", 3) == captions("long", 3) != captions("long", 3, seed=1)


def test_rounds_take_turns_and_warm_up_is_not_counted() -> None:
    order: list[tuple[str, int]] = []
    works = {name: (lambda number, name=name: order.append((name, number))) for name in "ab"}
    timings = interleave(works, warmup=1, repeats=2, device=CPU)
    assert order == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert all(len(timing.seconds) == 2 and timing.peak_gib is None for timing in timings.values())
    slow = interleave({"slow": lambda _: time.sleep(0.02)}, 0, 1, CPU)["slow"]
    assert 0.02 <= slow.seconds[0] < 0.2

    def too_large(number: int) -> None:
        raise torch.OutOfMemoryError("too much")

    timings = interleave({"large": too_large, "small": lambda _: None}, 1, 3, CPU)
    assert len(timings["small"].seconds) == 3 and not timings["large"].seconds
    row = make_row(timings, "large", 4, note="4 x 512 px")
    assert row.median is None and "did not fit" in row.note and row.note.startswith("4 x 512 px")


def test_speed_up_and_mfu() -> None:
    timings = {"reference": Timing([2.0, 4.0, 2.0]), "ours": Timing([1.0, 1.0, 1.0])}
    assert ratio(*timings.values()) == pytest.approx(8 / 3)
    row = make_row(timings, "ours", 8, flop=4e14, peak=1000.0)
    assert (row.rate, row.tflops) == (8.0, 400.0) and row.speedup == pytest.approx(8 / 3)
    assert row.mfu == pytest.approx(0.4) and make_row(timings, "reference", 8).speedup is None
    assert cells(row)[6:8] == ["2.67 x", "400 (40.0%)"]
    assert cells(Row("step", 2, "paper", "ours", note="did not fit"))[-1] == "did not fit"
    assert set(bench_of("preset=paper").arms()) == {"paper", "masked"}
    assert set(bench_of().arms()) == {"modern", "paper", "masked"}


def test_mistakes_cost_one_sentence() -> None:
    for argument in ("stages=4", "what=nothing", "repeats=0", "switches=turbo", "device=tpu", "steps=x"):
        user_error(argument.partition("=")[0], parse_settings, [argument])
    user_error("unit", benchmark, [*SHORT, "unit=tiny"])
    user_error("too small", benchmark_plan, ["rows=10"])
    user_error("stage 1", benchmark_cache, ["stage=2"])


def test_a_start_is_measured_from_processes_of_its_own(tmp_path: Path) -> None:
    stem = benchmark_plan(["rows=2000", "shards=100", "step=50", "batch_size=4", "repeats=2", f"output={tmp_path}", "name=plan"])
    document = json.loads(stem.with_suffix(".json").read_text())
    assert [row["sources"] for row in document["rows"]] == [1, 3] and document["settings"]["step"] == 50
    for row in document["rows"]:
        assert row["first"] > 0
        assert all(len(row[key]) == 2 and min(row[key]) > 0 for key in ("start", "seek", "next_batch"))
    assert "step 50 found" in stem.with_suffix(".md").read_text()


def reading(folder: Path) -> list[psutil.Process]:
    """The processes that read from ``folder``."""
    return [one for one in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(one.info["cmdline"] or [])]


def test_a_way_that_cannot_begin_leaves_nothing(tmp_path: Path) -> None:
    said = "bench_readers webdataset ended before it had measured"
    user_error(said, run_way, "webdataset", sys.executable, LoaderBench(workers=1), tmp_path / "nothing")
    assert not reading(tmp_path)


def test_rows_of_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = locate(compose_train(["text_encoder=tiny"]).text_encoder)
    monkeypatch.setattr("paradiffusion.budget.bench_loader.locate", lambda _: tokenizer)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    keys = ["samples=96", "width=64", "height=48", "resolution=32", "batch_size=8", "workers=1", "batches=3", "repeats=1"]
    stem = benchmark_loader([*keys, "step_seconds=0.01", f"output={tmp_path}"])
    rows = json.loads(stem.with_suffix(".json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["ours", "webdataset"] and rows[0]["version"] == "this repository"
    for row in rows:
        assert len(row["rates"]) == 1 and min(row["rates"]) > 0 and 0 <= row["waiting"] <= 1
    assert rows[0]["padded"]["1"] < rows[1]["padded"]["1"], "ours sorts captions by length"
    assert not reading(tmp_path)


def test_padding_is_the_share_of_computed_tokens() -> None:
    assert padding([[4, 8], [8, 8]], 1) == pytest.approx(4 / 32)
    assert padding([[4, 9]], 8) == pytest.approx(1 - 13 / 32)
