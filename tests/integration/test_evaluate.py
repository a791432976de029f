"""scripts/evaluate.py from a checkpoint's weights to the report: drawing, scoring, comparing, and what is refused."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
from pathlib import Path

import pytest
from commands import wait_for
from evaluations import EXACT, copy_run, evaluate_here, make_run, record_in, write_prompts
from PIL import Image

from paradiffusion.errors import UserError
from paradiffusion.evaluation.result import estimate, read_evaluation

SIX = ("suite=scenes", "count=6", EXACT)
DRAWN = ("suite=scenes", "count=6", "scores=[]")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, codec_folder: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("evaluate") / "runs" / "tiny", codec_folder)


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return copy_run(made, Path("runs/tiny"))


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("0*.png")}


def test_a_checkpoint_on_scenes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_here(f"ckpt={run}", *SIX) == 0
    folder = run / "stage2" / "evaluation" / "scenes_count6"
    evaluation = read_evaluation(folder)
    assert (evaluation.label, evaluation.kind, evaluation.source["step"]) == ("tiny stage 2", "checkpoint", 5)
    assert [image.prompt for image in evaluation.images] == [prompt.id for prompt in evaluation.suite.prompts]
    assert [image.seed for image in evaluation.images] == [p.seed("scenes") for p in evaluation.suite.prompts]
    for image, prompt in zip(evaluation.images, evaluation.suite.prompts, strict=True):
        with Image.open(image.file) as picture:
            assert picture.size == (prompt.width, prompt.height)  # this checkpoint's resolution is that of the scenes
    assert [score.name for score in evaluation.scores] == ["scenes", "sentences", "segments"]
    assert all(len(score.images) == 6 for score in evaluation.scores)
    for name in ("report.html", "report.md", "report.json", "images/manifest.jsonl"):
        assert (folder / name).is_file()
    printed = capsys.readouterr().out
    assert "95 %" in printed and f"Look at {folder / 'report.html'}" in printed

    before = (times(folder / "images"), (folder / "evaluation.json").read_bytes())
    assert evaluate_here(f"ckpt={run}", *SIX) == 0
    assert (times(folder / "images"), (folder / "evaluation.json").read_bytes()) == before
    assert "drawing" not in capsys.readouterr().err  # nor are the models loaded

    assert evaluate_here(f"ckpt={run}", *SIX, "images_per_prompt=2") == 0  # more of the same
    assert {name: at for name, at in times(folder / "images").items() if "_" not in name} == before[0]
    assert [image["name"] for image in record_in(folder)["images"]][:2] == ["val-000000", "val-000000_1"]


def test_stages_are_compared(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write_prompts(Path("mine.jsonl"), [{"prompt": "A red circle. It is large."}, {"prompt": "two words"}])
    suites = (f"suite=[scenes,{prompts}]", "count=3", EXACT)
    assert evaluate_here(f"compare=[{run}/stage1,{run}/stage2]", *suites) == 0
    for suite in ("scenes_count3", "mine_count3"):
        report = json.loads((run / "evaluation" / suite / "report.json").read_text())
        assert '"stage 1"' in json.dumps(report) and '"stage 2"' in json.dumps(report)
    assert (run / "evaluation" / "report.html").is_file()
    printed = capsys.readouterr().out
    assert "stage 1  " in printed and "not computed, the report says why: scenes, sentences, segments" in printed

    made = [f"{run}/stage{stage}/evaluation/scenes_count3" for stage in (1, 2)]
    assert evaluate_here(f"compare=[early={made[0]},{made[1]}]", "output_dir=both") == 0
    assert "early" in Path("both/report.html").read_text()
    evaluate_here(f"ckpt={run}/stage1", "suite=scenes", "count=2", "scores=[]")
    with pytest.raises(UserError, match="with 3 and with 2 prompts, which are not the same ones"):
        evaluate_here(f"compare=[{made[0]},{run}/stage1/evaluation/scenes_count2]")
    with pytest.raises(UserError, match=r"has 3 prompts of scenes and not the same as asked for now \(2\)"):
        evaluate_here(f"compare=[{made[0]},{run}/stage2]", "suite=scenes", "count=2")


def test_a_prompt_that_cannot_be_drawn_is_a_failure(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "one"}, {"prompt": "two", "height": 33}, {"prompt": "three", "width": 32, "seed": 5}]
    prompts = write_prompts(Path("mine.jsonl"), rows)
    assert evaluate_here(f"ckpt={run}", f"suite={prompts}", "scores=[]") == 0
    images = record_in(run / "stage2" / "evaluation" / "mine")["images"]
    assert [bool(image["error"]) for image in images] == [False, True, False]
    assert "height=33" in images[1]["error"] and "multiple of 16" in images[1]["error"]
    assert "1 of 3 images failed and count as failures" in capsys.readouterr().out
    with pytest.raises(UserError, match="height=33 .* expected a multiple of 16"):  # of all: the settings' fault
        evaluate_here(f"ckpt={run}", "suite=scenes", "count=2", "height=33", "output_dir=out", "scores=[]")


def test_a_failed_image_stays_in_the_mean(run: Path) -> None:
    pictures = Path("theirs")
    evaluate_here(f"ckpt={run}", *SIX, "output_dir=out")
    pictures.mkdir()
    evaluation = read_evaluation(Path("out"))
    for image in evaluation.images[:3]:
        (pictures / f"{image.name}.png").write_bytes(image.file.read_bytes())
    evaluate_here(f"images={pictures}", *SIX, "output_dir=half")
    half = read_evaluation(Path("half"))
    for whole, part in zip(evaluation.scores, half.scores, strict=True):
        for measure in whole.measures:
            if whole.name == "segments" or measure.worst is None:  # retrieval among other pictures
                continue
            rows = {row.image: row for row in part.images}
            for row in whole.images[:3]:
                assert rows[row.image].values.get(measure.name) == row.values.get(measure.name)
            for row in whole.images[3:]:
                if measure.name in row.values:
                    assert rows[row.image].error and rows[row.image].values[measure.name] == measure.worst
            one, other = estimate(whole, measure), estimate(part, measure)
            assert one is not None and other is not None and other.n == one.n and other.mean <= one.mean


def test_a_renamed_run_goes_on(run: Path) -> None:
    evaluate_here(f"ckpt={run}", *DRAWN, "output_dir=out")
    before = times(Path("out/images"))
    Path("out/images/00001.png").unlink()
    run.rename("runs/other")
    evaluate_here("ckpt=runs/other", *DRAWN, "output_dir=out")
    after = times(Path("out/images"))
    assert [name for name in before if before[name] != after[name]] == ["00001.png"]


def test_a_stage_that_trained_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = run / "stage1"
    evaluate_here(f"ckpt={stage}", *DRAWN)
    copy_run(stage / "checkpoints" / "step_000005", stage / "checkpoints" / "step_000009")
    description = stage / "checkpoints" / "step_000009" / "checkpoint.json"
    description.write_text(description.read_text().replace('"step": 5', '"step": 9'))
    from paradiffusion.checkpoints.manifest import write_manifest

    write_manifest(description.parent)
    before = times(stage / "evaluation" / "scenes_count6" / "images")
    evaluate_here(f"ckpt={stage}", *DRAWN)
    assert record_in(stage / "evaluation" / "scenes_count6")["source"]["step"] == 9
    earlier = stage / "evaluation" / "step_000005" / "scenes_count6"
    assert times(earlier / "images") == before
    assert f"The evaluation of step 5 is now in {earlier}" in capsys.readouterr().out
    evaluate_here(f"ckpt={stage}/checkpoints/step_000005", *DRAWN)  # finds what was moved
    assert times(earlier / "images") == before


def test_other_settings_are_refused_by_name(run: Path) -> None:
    evaluate_here(f"ckpt={run}", *DRAWN, "guidance=2", "output_dir=out")
    for argument, words in {
        "guidance=3": r"out was made with guidance=2\.0 \(now 3\.0\); choose another output_dir=",
        "count=5": r"out was made with prompts=6 \(now 5\)",
        "dtype=bfloat16": r"dtype=float32 \(now bfloat16\)",
        f"ckpt={run}/stage1": "out was made with weights=",
    }.items():
        given = [a for a in (f"ckpt={run}", *DRAWN, "guidance=2") if a.partition("=")[0] != argument.partition("=")[0]]
        with pytest.raises(UserError, match=words) as caught:
            evaluate_here(*given, argument, "output_dir=out")
        assert "\n" not in str(caught.value)


def test_a_signal_stops_it_and_the_same_command_goes_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "stage2" / "evaluation" / "scenes_count6"
    slow = (f"ckpt={run}", *DRAWN, "steps=30", "batch_size=1")

    def stop() -> None:
        wait_for(lambda: (folder / "images" / "00000.png").is_file(), interval=0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=stop)
    watcher.start()
    assert evaluate_here(*slow) == 0
    watcher.join()
    assert "Stopped; the same command goes on from here." in capsys.readouterr().out
    before = times(folder / "images")
    assert 1 <= len(before) < 6 and not (folder / "evaluation.json").exists()
    assert evaluate_here(*slow) == 0
    after = times(folder / "images")
    assert len(after) == 6 and all(after[name] == at for name, at in before.items())


WRONG = {
    "expected one of ckpt=, pipeline=, images=, compare=, found none": ("suite=scenes",),
    "found ckpt= and images=": ("suite=scenes", "ckpt=a", "images=b"),
    "suite= is missing": ("ckpt=a",),
    "suite=nothing is unknown": ("ckpt={run}", "suite=nothing"),
    "ckpt=nowhere holds no checkpoint": ("ckpt=nowhere", "suite=scenes"),
    "steps=0 is out of range": ("ckpt={run}", "suite=scenes", "steps=0"),
    "solver=best is unknown": ("ckpt={run}", "suite=scenes", "solver=best"),
    "sampler=best is unknown; choose one of": ("ckpt={run}", "suite=scenes", "sampler=best"),
    "device=tpu0 is unknown": ("ckpt={run}", "suite=scenes", "device=tpu0"),
    r"the argument 'stepps=3' is not understood .did you mean steps=\?.; the keys are ckpt, pipeline": ("ckpt={run}", "stepps=3"),
    r"scores=\[best\]: best is unknown; choose among scenes, sentences": ("ckpt={run}", "suite=scenes", "scores=[best]"),
    r"fid cannot be computed: reference= is not given": ("ckpt={run}", "suite=scenes", "scores=[fid]"),
    "counterfactual cannot be computed: .* needs a model": ("images={run}/pictures", "suite=scenes", "scores=[counterfactual]"),
    "steps= is for drawing, and images= draws nothing": ("images={run}", "suite=scenes", "steps=3"),
    "counterfactual=2 draws further pictures, and images= draws nothing": (
        "images={run}/pictures", "suite=scenes", "counterfactual=2"
    ),
    "clip=nowhere is neither a folder nor": ("ckpt={run}", "suite=scenes", "clip=nowhere"),
    "names one; expected at least two": ("compare=[{run}]", "suite=scenes"),
    "has two of the label tiny stage 2": ("compare=[{run},{run}/stage2]", "suite=scenes"),
    "compare= names nowhere, which is no folder": ("compare=[{run},nowhere]", "suite=scenes"),
    "holds neither a checkpoint, nor a pipeline": ("compare=[{run},{run}/empty]", "suite=scenes"),
    "label= is for one model": ("compare=[{run},a]", "suite=scenes", "label=x"),
    "agreement= asks which of two": ("ckpt={run}", "suite=scenes", "agreement=votes.csv"),
    "holds no model_index.json": ("pipeline={run}", "suite=scenes"),
    "does not say of which suite": ("ckpt={run}", "suite=[scenes,paraprompts]", "suite_path=here"),
    "both vlm= and endpoint=": ("ckpt={run}", "suite=scenes", "vlm=a", "endpoint=b"),
}  # fmt: skip


@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_be_meant_is_one_sentence(run: Path, words: str) -> None:
    (run / "empty").mkdir()
    (run / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(run / "pictures" / "val-000000.png")
    with pytest.raises(UserError, match=words) as caught:
        evaluate_here(*(argument.format(run=run) for argument in WRONG[words]))
    assert "\n" not in str(caught.value)
    assert not list(Path().glob("runs/**/images/0*.png"))  # before anything is drawn


def test_a_full_disk_is_one_sentence_and_nothing_is_lost(run: Path) -> None:
    arguments = (f"ckpt={run}", *DRAWN, "output_dir=out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))  # a picture has over 4 kB
    try:
        with pytest.raises((UserError, OSError)) as caught:
            evaluate_here(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert "\n" not in str(caught.value)
    assert evaluate_here(*arguments) == 0
    assert len(times(Path("out/images"))) == 6


def test_a_second_evaluation_is_kept_out(run: Path) -> None:
    import fcntl

    Path("out").mkdir()
    with Path(".out.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another evaluation is writing to out; wait for its end"):
            evaluate_here(f"ckpt={run}", *DRAWN, "output_dir=out")
