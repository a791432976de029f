"""scripts/evaluate.py with models that look at the pictures: which scores it makes, and what happens when one cannot be had."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from evaluations import evaluate_here, make_run, record_in, write_prompts
from PIL import Image
from programs import two_ranks
from tiny_clip import write_clip
from tiny_vlm import write_vlm

from paradiffusion.errors import UserError
from paradiffusion.evaluation.evaluate import without_nan
from paradiffusion.evaluation.evaluate_options import EvaluateOptions
from paradiffusion.evaluation.offered_scores import make_scores, offers
from paradiffusion.evaluation.records import ImageScore, Measure, ScoreResult, estimate, read_evaluation
from paradiffusion.evaluation.suites.load import load_suite
from paradiffusion.evaluation.suites.suite import Suite, SuitePrompt

ROWS = [
    {"tag": "counting", "include": [{"class": "bird", "count": 2}], "prompt": "Two birds sit on a branch. It is dawn."},
    {
        "tag": "colors",
        "include": [{"class": "bus", "count": 1, "color": "red"}],
        "prompt": "A red bus. The road is wet.",
    },
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, codec_folder: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "run": make_run(folder / "runs" / "tiny", codec_folder),
        "clip": write_clip(folder / "clip"),
        "vlm": write_vlm(folder / "vlm"),
    }


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
    with pytest.raises(UserError, match="fidd is unknown; choose among scenes, "):
        chosen(plain, scores="[fid,fidd]")


def test_a_distance_of_sets_on_two_processes(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    suite = ("suite=geneval", f"suite_path={write_prompts(Path('geneval.jsonl'), ROWS)}", "allow_other=true")
    for folder, colours in (("one", ("red", "green")), ("other", ("blue", "grey"))):
        Path(folder).mkdir()
        for prompt, colour in zip(
            load_suite("geneval", "geneval.jsonl", allow_other=True).prompts, colours, strict=True
        ):
            Image.new("RGB", (32, 32), colour).save(Path(folder, f"{prompt.id}.png"))
    arguments = [
        "compare=[one,other]",
        *suite,
        f"clip={models['clip']}",
        "scores=[clip_fd]",
        "reference=one",
        "output_dir=both",
    ]
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


def test_a_score_that_fails_does_not_keep_the_others(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
