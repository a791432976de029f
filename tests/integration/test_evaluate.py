"""scripts/evaluate.py from a checkpoint to the report: drawing, models that score, comparing, stopping, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from commands import user_error
from evaluations import EXACT, copy_run, evaluate_here, make_run, record_in, write_prompts
from PIL import Image
from programs import end, fork, script, two_ranks

from paradiffusion.atomic import locked
from paradiffusion.checkpoints.manifest import write_manifest
from paradiffusion.errors import UserError
from paradiffusion.evaluation.evaluate import without_nan
from paradiffusion.evaluation.evaluate_options import EvaluateOptions
from paradiffusion.evaluation.offered_scores import make_scores, offers
from paradiffusion.evaluation.records import ImageScore, Measure, ScoreResult, estimate, read_evaluation
from paradiffusion.evaluation.suites.load import load_suite
from paradiffusion.evaluation.suites.suite import Suite, SuitePrompt

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
    assert [(score.name, len(score.images)) for score in evaluation.scores] == [
        ("scenes", 6), ("sentences", 6), ("segments", 6)
    ]  # fmt: skip
    for name in ("report.html", "report.md", "report.json", "images/manifest.jsonl"):
        assert (folder / name).is_file()
    printed = capsys.readouterr().out
    assert "95 %" in printed and f"Look at {folder / 'report.html'}" in printed

    before = (times(folder / "images"), (folder / "evaluation.json").read_bytes())
    assert evaluate_here(f"ckpt={run}", *SIX) == 0
    assert (times(folder / "images"), (folder / "evaluation.json").read_bytes()) == before
    assert "drawing" not in capsys.readouterr().err  # nor are the models loaded

    assert evaluate_here(f"ckpt={run}", *DRAWN, "images_per_prompt=2") == 0  # more of the same
    assert {name: at for name, at in times(folder / "images").items() if "_" not in name} == before[0]
    assert [image["name"] for image in record_in(folder)["images"]][:2] == ["val-000000", "val-000000_1"]


def test_stages_are_compared(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write_prompts(Path("mine.jsonl"), [{"prompt": "A red circle. It is large."}, {"prompt": "two words"}])
    suites = (f"suite=[scenes,{prompts}]", "count=2", EXACT)
    assert evaluate_here(f"compare=[{run}/stage1,{run}/stage2]", *suites) == 0
    for suite in ("scenes_count2", "mine_count2"):
        report = (run / "evaluation" / suite / "report.json").read_text()
        assert '"stage 1"' in report and '"stage 2"' in report
    assert (run / "evaluation" / "report.html").is_file()
    printed = capsys.readouterr().out
    assert "stage 1  " in printed and "not computed, the report says why: scenes, sentences, segments" in printed

    made = [f"{run}/stage{stage}/evaluation/scenes_count2" for stage in (1, 2)]
    assert evaluate_here(f"compare=[early={made[0]},{made[1]}]", "output_dir=both") == 0
    assert "early" in Path("both/report.html").read_text()
    evaluate_here(f"ckpt={run}/stage1", "suite=scenes", "count=1", "scores=[]")
    with pytest.raises(UserError, match="with 2 and with 1 prompts, which are not the same ones"):
        evaluate_here(f"compare=[{made[0]},{run}/stage1/evaluation/scenes_count1]")
    with pytest.raises(UserError, match=r"has 2 prompts of scenes and not the same as asked for now \(1\)"):
        evaluate_here(f"compare=[{made[0]},{run}/stage2]", "suite=scenes", "count=1")


def test_a_report_says_at_which_length_paragraphs_are_cut(run: Path) -> None:
    options = "suite_options={number: 2, caption: short, lengths: [20, 900]}"
    assert evaluate_here(f"ckpt={run}", "suite=scenes", options, "scores=[]", "output_dir=out") == 0
    assert read_evaluation(Path("out")).source["cut_prompts"] == {"900 words": 2}
    assert "prompts: 900 words: 2;" in Path("out/report.md").read_text()


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


def test_a_stage_that_trained_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = run / "stage1"
    evaluate_here(f"ckpt={stage}", *DRAWN)
    copy_run(stage / "checkpoints" / "step_000005", stage / "checkpoints" / "step_000009")
    description = stage / "checkpoints" / "step_000009" / "checkpoint.json"
    description.write_text(description.read_text().replace('"step": 5', '"step": 9'))
    write_manifest(description.parent)
    before = times(stage / "evaluation" / "scenes_count6" / "images")
    evaluate_here(f"ckpt={stage}", *DRAWN)
    assert record_in(stage / "evaluation" / "scenes_count6")["source"]["step"] == 9
    earlier = stage / "evaluation" / "step_000005" / "scenes_count6"
    assert times(earlier / "images") == before
    assert f"The evaluation of step 5 is now in {earlier}" in capsys.readouterr().out
    evaluate_here(f"ckpt={stage}/checkpoints/step_000005", *DRAWN)  # finds what was moved
    assert times(earlier / "images") == before
    # A run that was renamed goes on, too.
    (earlier / "images" / "00001.png").unlink()
    run.rename("runs/other")
    earlier = Path("runs/other/stage1/evaluation/step_000005/scenes_count6")
    evaluate_here("ckpt=runs/other/stage1/checkpoints/step_000005", *DRAWN)
    assert [name for name, at in times(earlier / "images").items() if before[name] != at] == ["00001.png"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_or_killed_the_same_command_goes_on(run: Path, tmp_path: Path, number: int) -> None:
    slow = [f"ckpt={run}", *DRAWN, "steps=30", "batch_size=1", "output_dir=out"]
    child = fork("evaluate", slow, tmp_path / "said.txt")
    code = end(child, lambda: len(list(Path("out/images").glob("0*.png"))) > 1, number)
    said = (tmp_path / "said.txt").read_text()
    assert (code, "Stopped; the same command goes on from here." in said) in ((128 + signal.SIGTERM, True), (-signal.SIGKILL, False))
    assert not Path("out/evaluation.json").exists()
    lines = [line for path in Path("out/images").glob("manifest*.jsonl") for line in path.read_text().splitlines()]
    noted = {json.loads(line)["file"] for line in lines}
    before = {name: at for name, at in times(Path("out/images")).items() if name in noted}
    assert 1 <= len(before) < 6
    assert evaluate_here(*slow) == 0
    after = times(Path("out/images"))
    assert len(after) == 6 and all(after[name] == at for name, at in before.items())  # nothing is drawn twice


def test_help_names_every_key() -> None:
    evaluate = script("evaluate")
    for key in EvaluateOptions.__dataclass_fields__:
        assert f"{key}=" in evaluate.__doc__ or f"{key}." in evaluate.__doc__, key


def test_other_settings_are_refused_by_name(run: Path) -> None:
    evaluate_here(f"ckpt={run}", *DRAWN, "guidance=2", "output_dir=out")
    for argument, words in {
        "guidance=3": r"out was made with guidance=2\.0 \(now 3\.0\); choose another output_dir=",
        "count=5": r"out was made with prompts=6 \(now 5\)",
        "dtype=bfloat16": r"dtype=float32 \(now bfloat16\)",
        f"ckpt={run}/stage1": "out was made with weights=",
    }.items():
        given = [a for a in (f"ckpt={run}", *DRAWN, "guidance=2") if a.partition("=")[0] != argument.partition("=")[0]]
        user_error(words, evaluate_here, *given, argument, "output_dir=out")


WRONG = {
    "ckpt=nowhere holds no checkpoint": "ckpt=nowhere suite=scenes output_dir=out",
    "expected one of ckpt=, pipeline=, images=, compare=, found none": "suite=scenes",
    "found ckpt= and images=": "suite=scenes ckpt=a images=b",
    "suite= is missing": "ckpt=a",
    "suite=nothing is unknown": "ckpt={run} suite=nothing",
    "steps=0 is out of range": "ckpt={run} suite=scenes steps=0",
    "solver=best is unknown": "ckpt={run} suite=scenes solver=best",
    "sampler=best is unknown; choose one of": "ckpt={run} suite=scenes sampler=best",
    "device=tpu0 is unknown": "ckpt={run} suite=scenes device=tpu0",
    r"the argument 'stepps=3' is not understood .did you mean steps=\?.; the keys are .*ckpt, pipeline": "ckpt={run} stepps=3",
    r"scores=\[best\]: best is unknown; choose among scenes, sentences": "ckpt={run} suite=scenes scores=[best]",
    r"fid cannot be computed: reference= is not given": "ckpt={run} suite=scenes scores=[fid]",
    "counterfactual cannot be computed: .* needs a model": "images={run}/pictures suite=scenes scores=[counterfactual]",
    "steps= is for drawing, and images= draws nothing": "images={run} suite=scenes steps=3",
    "counterfactual= is for drawing, and images= draws nothing": "images={run}/pictures suite=scenes counterfactual=2",
    "clip=nowhere is neither a folder nor": "ckpt={run} suite=scenes clip=nowhere",
    "names one; expected at least two": "compare=[{run}] suite=scenes",
    "has two of the label tiny stage 2": "compare=[{run},{run}/stage2] suite=scenes",
    "compare= names nowhere, which is no folder": "compare=[{run},nowhere] suite=scenes",
    "holds neither a checkpoint, nor a pipeline": "compare=[{run},{run}/empty] suite=scenes",
    "label= is for one model": "compare=[{run},a] suite=scenes label=x",
    "agreement=, votes= and baseline= are for a comparison": "ckpt={run} suite=scenes agreement=votes.csv",
    "holds no model_index.json": "pipeline={run} suite=scenes",
    "does not say of which suite": "ckpt={run} suite=[scenes,paraprompts] suite_path=here",
    "both vlm= and endpoint=": "ckpt={run} suite=scenes vlm=a endpoint=b",
}  # fmt: skip


def test_what_cannot_be_meant_is_one_sentence(run: Path) -> None:
    (run / "empty").mkdir()
    (run / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(run / "pictures" / "val-000000.png")
    for words, arguments in WRONG.items():
        user_error(words, evaluate_here, *arguments.format(run=run).split())
    assert not list(Path().glob("runs/**/images/0*.png"))  # before anything is drawn

    Path("out").mkdir()
    refused = pytest.raises(UserError, match="another evaluation is writing to out; wait for its end")
    with locked(Path("out").resolve()), refused:
        evaluate_here(f"ckpt={run}", *DRAWN, "output_dir=out")


def test_two_processes_give_what_one_gives(run: Path, tmp_path: Path) -> None:
    arguments = [f"ckpt={run}", *SIX, "counterfactual=2", "scores=[scenes,sentences,segments,counterfactual]"]
    codes, said = two_ranks("evaluate", [*arguments, "output_dir=two", "threads=1"], tmp_path)
    assert codes == [0, 0], said
    assert evaluate_here(*arguments, "output_dir=one") == 0
    one, two = ({path.name: np.asarray(Image.open(path)).astype(int) for path in Path(name, "images").glob("0*.png")}
                for name in ("one", "two"))  # fmt: skip
    assert one.keys() == two.keys() and len(one) == 6
    # Their batches are not of one size, which rounds differently.
    assert all(np.abs(image - two[name]).max() <= 1 for name, image in one.items())
    # Of the same pictures both say the same.
    shutil.copytree("two/images", "again/images")
    assert evaluate_here(*arguments, "output_dir=again") == 0
    assert Path("again/evaluation.json").read_bytes() == Path("two/evaluation.json").read_bytes()
    assert "".join(said).count("Look at") == 2  # the pictures, and the report: said once


ROWS = [
    {"tag": "counting", "include": [{"class": "bird", "count": 2}], "prompt": "Two birds sit on a branch. It is dawn."},
    {"tag": "colors", "include": [{"class": "bus", "count": 1, "color": "red"}], "prompt": "A red bus. The road is wet."},
]


@pytest.fixture(scope="module")
def models(made: Path, clip_folder: Path, vlm: Path) -> dict[str, Path]:
    return {"run": made, "clip": clip_folder, "vlm": vlm}


def chosen(suite: Suite, painter: object = None, **values: object) -> dict[str, bool]:
    """Names of the scores that would be made, with whether they are computed."""
    options = EvaluateOptions(**values)  # type: ignore[arg-type]
    found = make_scores(options, offers(options, suite, painter, "cpu", "checkpoint"))  # type: ignore[arg-type]
    return {score.name: not isinstance(score, ScoreResult) for score in found}


def test_a_value_that_is_no_number_is_a_failure() -> None:
    measures = [Measure("cosine", "", worst=-1.0), Measure("change", "", worst=None)]
    images = [ImageScore(name, name, {"cosine": value, "change": value}) for name, value in
              (("a", 0.5), ("b", float("nan")), ("c", float("inf")))]  # fmt: skip
    found = without_nan(ScoreResult("s", "S", measures=measures, images=images))
    assert [one.values for one in found.images] == [{"cosine": 0.5, "change": 0.5}, {"cosine": -1.0}, {"cosine": -1.0}]
    assert [bool(one.error) for one in found.images] == [False, True, True] and "cosine" in found.images[1].error
    whole = estimate(found, measures[0])
    assert whole is not None and (whole.n, whole.mean) == (3, -0.5)


def test_scores_are_made_from_what_is_given(models: dict[str, Path], tmp_path: Path) -> None:
    scenes = load_suite("scenes", count=2)
    plain = Suite("mine", "Mine", (SuitePrompt("a", "A bird."),))
    computed = {name for name, made in chosen(scenes, painter=object()).items() if made}
    assert computed == {"scenes", "sentences", "counterfactual", "segments"}  # the truth is known
    assert "counterfactual" not in chosen(scenes, painter=object(), counterfactual=0)
    assert not any(chosen(plain, painter=object()).values())
    assert "checklist" not in chosen(plain)  # it has no questions
    clip = str(models["clip"])
    assert {name for name, made in chosen(plain, clip=clip).items() if made} == {"sentences", "segments"}
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    assert chosen(plain, clip=clip, reference=str(tmp_path))["clip_fd"]
    assert list(chosen(plain, scores="[fid, segments]", clip=clip)) == ["segments", "fid"]
    user_error("fidd is unknown; choose among scenes, ", chosen, plain, scores="[fid,fidd]")


def test_a_distance_of_sets_on_two_processes(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    suite = ("suite=geneval", f"suite_path={write_prompts(Path('geneval.jsonl'), ROWS)}", "allow_other=true")
    for folder, colours in (("one", ("red", "green")), ("other", ("blue", "grey"))):
        Path(folder).mkdir()
        for prompt, colour in zip(load_suite("geneval", "geneval.jsonl", allow_other=True).prompts, colours, strict=True):
            Image.new("RGB", (32, 32), colour).save(Path(folder, f"{prompt.id}.png"))
    arguments = ["compare=[one,other]", *suite, f"clip={models['clip']}", "scores=[clip_fd]", "reference=one", "output_dir=both"]
    codes, said = two_ranks("evaluate", arguments, tmp_path)
    assert codes == [0, 0], said
    assert "clip_fd" not in "".join(said).partition("not computed")[2]


def test_models_judge_and_people_are_agreed_with(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    prompts = write_prompts(Path("geneval.jsonl"), ROWS)
    suite = ("suite=geneval", f"suite_path={prompts}", "allow_other=true")
    suite_prompts = load_suite("geneval", str(prompts), allow_other=True).prompts
    theirs = Path("theirs")
    theirs.mkdir()
    for prompt in suite_prompts:
        Image.new("RGB", (32, 32), "green").save(theirs / f"{prompt.id}.png")
    with Path("votes.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", "set_a", "set_b", "question", "choice", "rater"])
        rows.writerows([prompt.id, "ours", "theirs", "faithfulness", "a", "anna"] for prompt in suite_prompts)
    arguments = (
        f"compare=[ours={models['run']}/stage1,theirs={theirs}]", *suite, f"clip={models['clip']}", f"vlm={models['vlm']}",
        "reference=theirs", "counterfactual=1", "agreement=votes.csv", "output_dir=both",
    )  # fmt: skip
    assert evaluate_here(*arguments) == 0
    ours = read_evaluation(models["run"] / "stage1" / "evaluation" / "geneval")
    computed = {score.name for score in ours.scores if not score.skipped}
    assert computed == {"counterfactual", "segments", "checklist", "clip_fd"}
    # an estimate by comparison needs more prompts than these two
    assert {score.name for score in ours.scores if score.skipped} == {"sentences", "caption_back", "fid", "kid"}
    for score in ours.scores:
        if not score.skipped:
            assert all(estimate(score, measure) is not None for measure in score.measures[:1]), score.name
    report = Path("both/report.html").read_text()
    assert "Agreement with people" in report
    assert "not computed, the report says why: sentences, caption_back, fid, kid" in capsys.readouterr().out
    kept = sorted((models["run"] / "stage1" / "evaluation" / "geneval" / "scores").rglob("journal.rank0.jsonl"))
    before = [path.read_text() for path in kept]
    assert sum(len(text.splitlines()) for text in before) >= 4
    assert evaluate_here(*arguments) == 0  # asks nothing twice
    assert [path.read_text() for path in kept] == before


def test_a_score_that_fails_does_not_keep_the_others(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prompts = write_prompts(Path("mine.jsonl"), [{"prompt": "A bird. A cat."}])
    (tmp_path / "broken").mkdir()
    for file in models["clip"].iterdir() if models["clip"].is_dir() else []:
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="all was written but a score that could not be computed") as caught:
        evaluate_here(f"ckpt={models['run']}", "suite=scenes", "count=2", f"clip={tmp_path / 'broken'}", "output_dir=out",
                      "counterfactual=0")  # fmt: skip
    assert "\n" not in str(caught.value)
    scores = {score["name"]: score for score in record_in(Path("out"))["scores"]}
    assert scores["segments"]["skipped"] and not scores["scenes"]["skipped"] and not scores["sentences"]["skipped"]
    assert json.loads(Path("out/report.json").read_text()) and prompts.is_file()
