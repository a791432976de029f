"""Making a small set: what the measures say of known pictures, scores by hand, thresholds, variety, export; and going on with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from commands import user_error
from data_fixtures import encoded, picture, shards_of
from PIL import Image, ImageFilter
from programs import script
from safetensors.torch import load_file, save_file
from tiny_clip import CONTEXT, WIDTH, write_candidates

from paradiffusion.atomic import locked
from paradiffusion.curation.choosing import scoring as technical
from paradiffusion.curation.choosing import selection
from paradiffusion.curation.choosing.candidates import Candidates, sample_name
from paradiffusion.curation.choosing.decisions import DecisionLog
from paradiffusion.curation.choosing.kept import export
from paradiffusion.curation.choosing.score_files import ScoreTable, load_scores, move_root, score_file
from paradiffusion.curation.choosing.scoring import Scoring, load_detector, score_shards, union_share
from paradiffusion.curation.choosing.select_steps import SelectOptions, run_step
from paradiffusion.curation.choosing.selection import Choosing, choose, choose_varied, clusters_of, weighted_rank
from paradiffusion.data.images import decode
from paradiffusion.data.index import load_index, read_sample
from paradiffusion.data.shards import RawSample, expand_shards, write_shards
from paradiffusion.errors import UserError
from paradiffusion.metrics.clip import Clip, load_clip, load_head

# --- technical measures


@pytest.mark.parametrize("quality", [1, 30, 50, 75, 90, 95, 100])
def test_the_quality_of_a_jpeg_is_read_from_its_tables(quality: int) -> None:
    assert technical.jpeg_quality(encoded(picture(1), "JPEG", quality=quality)) == quality
    assert np.isnan(technical.jpeg_quality(encoded(picture(1))))


def test_blur_lowers_sharpness_at_any_size() -> None:
    sharp = picture(2, 512, 512).convert("L")
    values = [technical.sharpness(sharp.filter(ImageFilter.GaussianBlur(radius))) for radius in (0, 1, 2, 4)]
    assert values == sorted(values, reverse=True) and values[0] > 20 * values[2]
    assert technical.sharpness(Image.new("L", (300, 400), 7)) == 0
    # The same picture, larger: the same sharpness, since it is measured at one size.
    smooth = sharp.filter(ImageFilter.GaussianBlur(4))
    larger = smooth.resize((1024, 1024), Image.Resampling.BICUBIC)
    assert technical.sharpness(larger) == pytest.approx(technical.sharpness(smooth), rel=0.05)


@pytest.mark.parametrize("sigma", [2.0, 10.0])
def test_noise_is_measured_in_grey_levels(sigma: float) -> None:
    ramp = np.linspace(60, 200, 400)[None] + np.zeros((400, 1))  # A slope is no noise.
    noisy = ramp + sigma * np.random.default_rng(0).standard_normal(ramp.shape)
    assert technical.noise(Image.fromarray(noisy.round().astype(np.uint8))) == pytest.approx(sigma, rel=0.05)


def test_bars_along_the_edges_are_a_share_of_the_area() -> None:
    inner = np.random.default_rng(0).integers(0, 256, (100, 200), dtype=np.uint8)
    letterbox = np.pad(inner, ((50, 50), (0, 0)))
    assert technical.border(letterbox) == pytest.approx(0.5)
    assert technical.border(letterbox.T) == pytest.approx(0.5)
    framed = np.pad(inner, ((50, 50), (100, 100)), constant_values=255)
    assert technical.border(framed) == pytest.approx(0.75)
    assert technical.border(inner) == 0 and technical.border(np.zeros((5, 9), np.uint8)) == 1


def test_tones_and_sizes_of_a_picture_that_is_half_black_and_a_quarter_white() -> None:
    pixels = np.full((400, 600), 100, np.uint8)
    pixels[:200], pixels[300:] = 0, 255
    data = encoded(Image.fromarray(pixels).convert("RGB"))
    values = technical.measure(decode(data), data)
    assert (values["width"], values["height"], values["short_side"], values["aspect"]) == (600, 400, 400, 1.5)
    assert values["clipped_dark"] == pytest.approx(0.5) and values["clipped_bright"] == pytest.approx(0.25)
    assert values["contrast"] == 1 and values["brightness"] == pytest.approx((0.25 * 100 + 0.25 * 255) / 255, abs=0.01)
    assert all(name in script("select").__doc__ for name in values), "the command's help names them all"


# --- models


def test_agreement_is_by_sentence_and_counts_what_was_cut(clip_folder: Path) -> None:
    clip = load_clip(str(clip_folder), "cpu")
    assert clip.context == CONTEXT
    features = clip.image_features(clip.prepare(picture(0))[None])
    long = "A " + "red " * CONTEXT + "cat."
    # A dash after an end mark begins no sentence of its own, and one alone does not count.
    captions = [f"A cat sits. {long}", "A cat sits.\n-- \U0001f600 !", "", "... --"]
    found, dashed, nothing, marks = clip.agreements(features.expand(4, -1), captions)
    assert nothing is None and marks is None and found is not None and dashed is not None
    assert (dashed.sentences, dashed.cut) == (1, 0)
    texts, cut = clip.text_features(["A cat sits.", long])
    assert cut == [False, True]
    each = (texts @ features[0]).tolist()
    assert (found.mean, found.minimum) == pytest.approx((sum(each) / 2, min(each)), abs=1e-6)
    assert (found.sentences, found.cut) == (2, 1)
    # A sentence that just fits is not cut: ten words with the marks around them.
    assert clip.text_features(["cat " * (CONTEXT - 2), "cat " * (CONTEXT - 1)])[1] == [False, True]


def test_heads_of_one_layer_and_of_several(tmp_path: Path) -> None:
    features = torch.randn(5, WIDTH)
    weight, bias = torch.randn(1, WIDTH), torch.randn(1)
    save_file({"weight": weight, "bias": bias}, tmp_path / "linear.safetensors")
    torch.testing.assert_close(load_head(tmp_path / "linear.safetensors")(features), (features @ weight.T + bias)[:, 0])

    # As LAION's improved predictor is stored: layers.10 comes after layers.2, and nothing between them.
    first, last = torch.nn.Linear(WIDTH, 4), torch.nn.Linear(4, 1)
    state = {f"layers.{n}.{k}": v for n, one in ((2, first), (10, last)) for k, v in one.state_dict().items()}
    torch.save(state, tmp_path / "mlp.pth")
    torch.testing.assert_close(load_head(tmp_path / "mlp.pth")(features), last(first(features))[:, 0].detach())
    save_file(state, tmp_path / "relu.safetensors", metadata={"activation": "relu"})
    expected = last(torch.relu(first(features)))[:, 0].detach()
    torch.testing.assert_close(load_head(tmp_path / "relu.safetensors")(features), expected)

    save_file({"weight": torch.zeros(2, WIDTH)}, tmp_path / "two.safetensors")
    for name in ("two.safetensors", "absent.pth"):
        user_error("lead from the CLIP features to one number", load_head, tmp_path / name)
    torch.save(Path("code"), tmp_path / "pickle.pth")  # any object but weights
    user_error("cannot be read", load_head, tmp_path / "pickle.pth")


def test_a_clip_that_is_not_there_or_wants_to_run_code_is_refused_in_a_sentence(clip_folder: Path, tmp_path: Path) -> None:
    for spec in ("ViT-L-14", "nonsense:openai", f"ViT-B-32:{tmp_path}/absent.safetensors", str(tmp_path)):
        user_error("clip=", load_clip, spec, "cpu")
    evil = shutil.copytree(clip_folder, tmp_path / "evil")
    config = json.loads((evil / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (evil / "open_clip_config.json").write_text(json.dumps(config))
    user_error("trust_remote_code", load_clip, str(evil), "cpu")


def test_the_area_under_boxes_counts_overlaps_once() -> None:
    boxes = np.array([[0, 0, 50, 100], [25, 0, 75, 100], [-10, 90, 20, 140]])
    assert union_share(boxes, 100, 100) == pytest.approx(0.75)
    assert union_share(np.zeros((0, 4)), 100, 100) == 0
    assert union_share(np.array([[0, 0, 1000, 4000]]), 4000, 4000) == pytest.approx(0.25)


def test_a_detection_model_says_how_much_is_text(tmp_path: Path) -> None:
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[32, 32],
        patch_size=16, num_detection_tokens=2, id2label={0: "text", 1: "cat"}, label2id={"text": 0, "cat": 1},
    )  # fmt: skip
    model = YolosForObjectDetection(config)
    with torch.no_grad():  # Every token sees the class 0 in a box of half the width and half the height.
        for head, bias in ((model.class_labels_classifier, [9.0, 0.0, 0.0]), (model.bbox_predictor, [0.0] * 4)):
            head.layers[-1].weight.zero_()
            head.layers[-1].bias.copy_(torch.tensor(bias))
    model.save_pretrained(tmp_path)
    YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    images = [picture(0, 64, 64), picture(1, 80, 40)]
    assert load_detector(str(tmp_path), ["text"], 0.3, "cpu")(images) == pytest.approx([0.25, 0.25], abs=0.02)
    assert load_detector(str(tmp_path), ["cat"], 0.3, "cpu")(images) == [0, 0]
    user_error("classes of .* are text, cat", load_detector, str(tmp_path), ["dog"], 0.3, "cpu")


# --- scoring


def test_scores_are_what_the_models_give_and_bad_images_are_rows_too(clip_folder: Path, tmp_path: Path) -> None:
    head = {"weight": torch.randn(1, WIDTH), "bias": torch.tensor([5.0])}
    save_file(head, tmp_path / "head.safetensors")
    good = RawSample("good", encoded(picture(3), "JPEG", quality=80), "jpg", {"captions": {"short": "A cat. A dog."}})
    bare = RawSample("bare", encoded(picture(4)), "png", {})
    write_shards([good, RawSample("bad", b"\xff\xd8nothing", "jpg", {}), bare], tmp_path / "shards", 10)
    scoring = Scoring(str(clip_folder), aesthetic=str(tmp_path / "head.safetensors"), batch_size=2, threads=2)
    assert score_shards(expand_shards(tmp_path / "shards"), tmp_path / "work", scoring) == 3

    table = load_scores(tmp_path / "work")
    assert table.keys.to_pylist() == ["good", "bad", "bare"] and table.unreadable.tolist() == [False, True, False]
    clip = load_clip(str(clip_folder), "cpu")
    pixels = torch.stack([clip.prepare(decode(one.image)) for one in (good, bare)])
    expected = clip.image_features(pixels)
    np.testing.assert_allclose(table.features(np.array([0, 2])), expected, atol=1e-3)
    by_hand = (expected @ head["weight"].T + head["bias"])[:, 0]
    np.testing.assert_allclose(table.columns["aesthetic"][[0, 2]], by_hand, atol=1e-5)
    assert table.columns["jpeg_quality"][0] == 80 and np.isnan(table.columns["jpeg_quality"][2])
    assert table.columns["sentences"][0] == 2 and np.isnan(table.columns["agreement_mean"][2])
    assert "text_area" not in table.columns  # no model for it was given


def test_scoring_goes_on_by_shard_and_in_processes_gives_the_same(clip_folder: Path, tmp_path: Path) -> None:
    shards_of(tmp_path / "shards", 12, 4)
    shards, scoring = expand_shards(tmp_path / "shards"), Scoring(str(clip_folder), threads=1)
    work = tmp_path / "work"
    assert score_shards(shards[:1], work, scoring) == 4
    before = score_file(work, "000000.tar").stat().st_mtime_ns
    assert score_shards(shards, work, scoring, processes=2) == 8
    assert score_shards(shards, work, scoring) == 0
    assert score_file(work, "000000.tar").stat().st_mtime_ns == before
    assert score_shards(shards, tmp_path / "one", scoring) == 12
    together, alone = load_scores(work), load_scores(tmp_path / "one")
    for name, column in alone.columns.items():
        np.testing.assert_allclose(together.columns[name], column, rtol=1e-5, atol=1e-6)

    write_shards([RawSample("new", encoded(picture(9)), "png", {})], tmp_path / "other", 4)
    shutil.copy(tmp_path / "other" / "000000.tar", shards[1])
    assert score_shards(shards, work, scoring) == 1  # a shard that was written anew
    user_error("caption=None, and caption=long", score_shards, shards, work, Scoring(str(clip_folder), caption="long"))


def test_features_of_other_weights_are_not_mixed_in(clip_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    shards_of(tmp_path / "shards", 8, 4)
    shards = expand_shards(tmp_path / "shards")
    score_shards(shards[:1], tmp_path / "work", Scoring(str(folder)))
    weights = load_file(folder / "open_clip_model.safetensors")
    weights["visual.proj"] += 1
    save_file(weights, folder / "open_clip_model.safetensors")
    score_shards(shards, tmp_path / "work", Scoring(str(folder)))
    user_error("2 different CLIP weights", load_scores, tmp_path / "work")


# --- choosing


def test_a_rank_is_weighted_and_blind_to_outliers() -> None:
    columns = {"aesthetic": np.array([1.0, 2.0, 1000.0, np.nan]), "noise": np.array([4.0, 3.0, 2.0, 1.0])}
    keys = pa.chunked_array([["0", "1", "2", "3"]])
    table = ScoreTable(["a.tar"], np.zeros(4, np.int32), keys, columns, np.zeros(4, bool), [Path("a.parquet")])
    rows = np.arange(4)
    assert weighted_rank(table, rows, {"aesthetic": 2.0}).tolist() == pytest.approx([1 / 3, 2 / 3, 1, 0])
    both = weighted_rank(table, rows, {"aesthetic": 1.0, "noise": -1.0})  # less noise is better
    assert both.tolist() == pytest.approx([1 / 6, 1 / 2, 5 / 6, 1 / 2])
    assert weighted_rank(table, rows[:1], {"noise": 1.0}).tolist() == [0]


def test_the_best_of_each_cluster_come_in_turn() -> None:
    scores, clusters = np.array([9.0, 8.0, 7.0, 3.0, 2.0, 1.0]), np.array([0, 0, 0, 1, 1, 2])
    features = np.eye(6, dtype=np.float32)
    assert choose_varied(scores, features, clusters).rows.tolist() == [0, 3, 5, 1, 4, 2]
    assert choose_varied(scores, features, clusters, count=4).rows.tolist() == [0, 3, 5, 1]
    assert choose_varied(scores, features, clusters, per_cluster=1).rows.tolist() == [0, 3, 5]
    assert choose_varied(scores, features, clusters * 0, count=2).rows.tolist() == [0, 1]
    # A near-duplicate gives its turn to the next of its cluster.
    features[1] = 0.999 * features[0] + 0.0447 * features[1]
    choice = choose_varied(scores, features, clusters * 0, count=2, max_similarity=0.95)
    assert choice.rows.tolist() == [0, 2] and choice.duplicates == 1


def test_choosing_writes_candidates_and_what_each_threshold_removed(tmp_path: Path) -> None:
    work = write_candidates(tmp_path / "work", ["words"] * 10)
    report = choose(work, Choosing(minimum={"aesthetic": 8.945}, maximum={"aesthetic": 8.985}, count=3))
    assert [(one.rule, one.alone, one.then) for one in report.removed] == [
        ("aesthetic >= 8.945", 4, 4), ("aesthetic <= 8.985", 2, 2),
    ]  # fmt: skip
    assert (report.samples, report.passed, report.chosen) == (10, 4, 3)
    lines = [json.loads(line) for line in (work / "candidates.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["picture-2", "picture-3", "picture-4"]
    assert lines[0]["sample"] == sample_name(lines[0]["shard"], "picture-2")
    assert json.loads((work / "choice.json").read_text())["chosen"] == 3
    with pytest.raises(UserError, match="'beauty', which was not scored; the scores are aesthetic"):
        choose(work, Choosing(minimum={"beauty": 1}))
    user_error("no sample is left of 10", choose, work, Choosing(minimum={"aesthetic": 99}))
    assert len((work / "candidates.jsonl").read_text().splitlines()) == 3  # A mistake changes nothing.


# --- export


def test_what_was_kept_becomes_shards_that_can_be_trained_on(tmp_path: Path) -> None:
    work = write_candidates(tmp_path / "work", [f"caption {number}" for number in range(6)])
    user_error("no candidate of 6", export, work, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    names = [json.loads(line)["sample"] for line in (work / "candidates.jsonl").read_text().splitlines()]
    long = "word " * 60

    def decide(*events: tuple[int, str, dict[str, str | None]]) -> None:
        log = DecisionLog(work / "decisions.jsonl")
        for at, (number, reviewer, changes) in enumerate(events, len(log.standing.events)):
            event = {"event": str(at), "sample": names[number], "reviewer": reviewer, "at": at, "set": changes}
            log.record(event)
        log.close()

    decide(
        (0, "anna", {"decision": "keep", "caption": long + "first", "note": "fine"}),
        (1, "anna", {"decision": "keep"}), (1, "ben", {"decision": "drop", "caption": "ben's text"}),
        (2, "anna", {"decision": "drop"}), (3, "anna", {"decision": "keep"}),
        (3, "ben", {"decision": "keep", "caption": "<b>bold</b>"}), (3, "ben", {"caption": "ben's last text"}),
    )  # fmt: skip
    report = export(work, tmp_path / "out", samples_per_shard=1)
    assert (report.candidates, report.kept, report.dropped, report.undecided) == (6, 2, 2, 2)
    assert (report.disagreed, report.edited) == (1, 2)
    assert report.mean_words == 32 and report.bands["50-100"] == 0.5 and report.bands["under 50"] == 0.5
    assert any("70.6" in line for line in report.lines())
    index = load_index(expand_shards(tmp_path / "out"))
    assert len(index) == 2 and set(index.kinds) == {"short", "long", "clean"}
    first, second = read_sample(index, 0), read_sample(index, 1)
    assert first.image == encoded(picture(0, 96, 96))
    assert first.meta["captions"] == {"short": "a thing", "long": "caption 0", "clean": long + "first"}
    assert first.meta["caption_sources"]["clean"] == "person" and first.meta["source_key"] == "picture-0"
    assert first.meta["review"]["reviewers"] == ["anna"] and second.meta["review"]["editor"] == "ben"
    assert second.meta["captions"]["clean"] == "ben's last text"
    kept = [json.loads(line) for line in (tmp_path / "out" / "kept.jsonl").read_text().splitlines()]
    assert [line["key"] for line in kept] == ["picture-0", "picture-3"] and kept[0]["notes"] == {"anna": "fine"}

    # Of who keeps it, and nobody who kept it wrote one; then a text of who does comes before another's later one.
    for name, text in (("any", "ben's text"), ("again", "carl's text")):
        assert export(work, tmp_path / name, votes="any").kept == 3
        edited = read_sample(load_index(expand_shards(tmp_path / name)), 1)
        assert edited.meta["captions"]["clean"] == text
        decide((1, "carl", {"decision": "keep", "caption": "carl's text"}))
    user_error("is not empty", export, work, tmp_path / "out")
    assert not list(tmp_path.glob(".*part"))


# --- the command line


def test_the_walk_on_the_command_line(clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = script("select").main
    shards_of(tmp_path / "shards", 6, 3)
    work = f"folder={tmp_path / 'work'}"
    assert main(["action=score", work, f"shards={tmp_path / 'shards'}", f"clip={clip_folder}"]) == 0
    assert "6 samples scored now, 2 shards" in capsys.readouterr().out
    assert main(["action=choose", work, "min={width: 60}", "count=2", "max_similarity=0.9999999"]) == 0
    shown = capsys.readouterr().out
    assert "2 candidates chosen" in shown and "width >= 60: removes 1" in shown
    user_error("no candidate of 2", main, ["action=export", work, f"output={tmp_path / 'out'}"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "action= is missing"), ("action=walk", "choose one of score, choose, review, export"),
        ("action=choose", "folder= is missing"), ("action=score folder=x", "shards= is missing"),
        ("action=choose folder=x clip=y", "clip= belongs to action=score"), ("action=choose folder=x count=0", "count=0"),
        ("action=choose folder=x min=5", "expected min='{aesthetic: 5.5"), ("action=choose folder=x min={a:[}", "is not understood"),
        ("action=choose folder=absent", "holds no scores"), ("action=review folder=absent", "holds no candidates"),
        ("action=score folder=x shards=absent.tar", "matches no .tar"),
        ("action=score folder=x shards=y device=tpu", "device=tpu is unknown"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(arguments: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        script("select").main(arguments.split())
    assert sentence in str(raised.value)


def write_samples(folder: Path, *keys: str) -> None:
    samples = [
        RawSample(key, encoded(picture(number)), "png", {"captions": {"long": f"a {key}"}, "licence": "CC0"})
        for number, key in enumerate(keys)
    ]
    write_shards(samples, folder, 10)


def keep_all(work: Path, **changes: str) -> None:
    """A person keeps every candidate, and edits the first one as ``changes`` say."""
    log = DecisionLog(work / "decisions.jsonl")
    for number, one in enumerate(Candidates.load(work).all):
        fields = {"decision": "keep", **(changes if number == 0 else {})}
        log.record({"event": one.sample, "sample": one.sample, "reviewer": "anna", "at": 1, "set": fields})
    log.close()


def test_a_model_that_could_not_be_loaded_does_not_bind_the_folder(clip_folder: Path, tmp_path: Path) -> None:
    write_samples(tmp_path / "shards", "cat")
    shards, work = expand_shards(tmp_path / "shards"), tmp_path / "work"
    user_error("could not be loaded", score_shards, shards, work, Scoring("nonsense:openai"))
    assert score_shards(shards, work, Scoring(str(clip_folder))) == 1
    user_error("holds scores made with clip=", score_shards, shards, work, Scoring("nonsense:openai"))
    (work / "scoring.json").write_text('{"clip"')
    user_error(r"scoring\.json cannot be read", score_shards, shards, work, Scoring(str(clip_folder)))


def test_a_root_that_holds_none_of_the_shards_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    write_samples(tmp_path / "a", "cat")
    work, scoring = tmp_path / "work", Scoring(str(clip_folder))
    assert score_shards(expand_shards(tmp_path / "a"), work, scoring) == 1
    (tmp_path / "a2").mkdir()
    (tmp_path / "a" / "000000.tar").rename(tmp_path / "a2" / "000000.tar")  # the folder stays, as a mount point does
    user_error("add shard_root=", score_shards, expand_shards(tmp_path / "a2"), work, scoring)
    user_error("holds none of the shards that were scored from", move_root, work, str(tmp_path))
    move_root(work, str(tmp_path / "a2"))
    assert score_shards(expand_shards(tmp_path / "a2"), work, scoring) == 0


def test_a_selection_goes_on_after_its_shards_were_moved(clip_folder: Path, tmp_path: Path) -> None:
    for place in ("here/a", "here/b"):
        write_samples(tmp_path / place, "cat", "dog")
    work, scoring = tmp_path / "work", Scoring(str(clip_folder))
    shards = expand_shards([tmp_path / "here" / "a", tmp_path / "here" / "b"])
    assert score_shards(shards, work, scoring) == 4
    choose(work, Choosing())
    before = (work / "candidates.jsonl").read_bytes()
    assert {json.loads(line)["shard"] for line in before.splitlines()} == {"a/000000.tar", "b/000000.tar"}
    keep_all(work)

    (tmp_path / "here").rename(tmp_path / "there")
    moved = expand_shards([tmp_path / "there" / "a", tmp_path / "there" / "b"])
    here = str(tmp_path / "here")
    user_error(f"2 of 2 shards .*what was in {here}", export, work, tmp_path / "out")
    user_error(f"from the folder {here}", score_shards, moved, work, scoring)  # each picture would be a candidate twice
    assert len(load_scores(work)) == 4

    def step(action: str, root: Path, **keys: str) -> int:
        return run_step(SelectOptions(action=action, folder=str(work), shard_root=str(root), **keys))

    user_error("is no folder", step, "choose", tmp_path / "nowhere")
    assert step("export", tmp_path / "there", output=str(tmp_path / "out")) == 0
    assert len(load_index(expand_shards(tmp_path / "out"))) == 4
    assert score_shards(moved, work, scoring) == 0  # recorded: nothing is asked or done again
    choose(work, Choosing())
    assert (work / "candidates.jsonl").read_bytes() == before  # the same samples under the same names


def test_a_folder_whose_shards_are_named_by_whole_paths_is_read(tmp_path: Path) -> None:
    work = write_candidates(tmp_path / "work", ["a", "b"])
    assert not (work / "scoring.json").exists() and len(Candidates.load(work).all) == 2
    with pytest.raises(UserError, match="records no folder of shards"):
        run_step(SelectOptions(action="choose", folder=str(work), shard_root=str(tmp_path)))
    shutil.rmtree(tmp_path / "shards")
    user_error(r"1 of 1 shards .* are missing; bring them back", Candidates.load, work)


def test_a_second_round_keeps_what_the_first_one_knew(clip_folder: Path, tmp_path: Path) -> None:
    write_samples(tmp_path / "shards", "cat", "dog")
    images = [read_sample(load_index(expand_shards(tmp_path / "shards")), row).image for row in range(2)]
    source = tmp_path / "shards"
    for turn in ("first", "second"):
        score_shards(expand_shards(source), tmp_path / turn, Scoring(str(clip_folder)))
        choose(tmp_path / turn, Choosing(weights={"words": 1.0}))
        # Typed back in the second round: still the text of the first.
        keep_all(tmp_path / turn, caption="A person wrote this.")
        source = tmp_path / f"{turn}_shards"
        export(tmp_path / turn, source)
    index = load_index(expand_shards(source))
    edited, kept = read_sample(index, 0), read_sample(index, 1)
    assert [edited.image, kept.image] == images
    assert edited.meta["captions"] == {"long": "a cat", "clean": "A person wrote this."} and edited.meta["licence"] == "CC0"
    assert edited.meta["caption_sources"]["clean"] == "person"
    assert kept.meta["caption_sources"]["clean"] == "long, kept by a person"
    assert edited.meta["review"]["editor"] is None
    earlier = edited.meta["review"]["earlier"]
    assert earlier["source_key"] == "cat" and earlier["review"]["editor"] == "anna"


def test_two_exports_at_once_do_not_mix(tmp_path: Path) -> None:
    work = write_candidates(tmp_path / "work", ["a", "b"])
    keep_all(work)
    other = tmp_path / ".out.part"
    other.mkdir()
    (other / "000007.tar.partial").write_bytes(b"half")
    with locked(tmp_path / "out"):  # as by an export that is at work, and is killed
        user_error("another export writes", export, work, tmp_path / "out")
        assert (other / "000007.tar.partial").exists()
    assert export(work, tmp_path / "out").kept == 2
    assert not list((tmp_path / "out").glob("*.partial"))


def test_where_nothing_passes_the_threshold_and_the_scores_are_told(tmp_path: Path) -> None:
    work = write_candidates(tmp_path / "work", ["a"] * 11)
    with pytest.raises(UserError) as raised:
        choose(work, Choosing(minimum={"aesthetic": 8.95}, maximum={"aesthetic": 8.905}))
    told = str(raised.value)
    assert "aesthetic <= 8.905 removes 10 by itself (aesthetic >= 8.95 5)" in told
    assert "between 8.9 and 9 (10 % below 8.91, half below 8.95, 90 % below 8.99)" in told
    user_error("did you mean 'aesthetic'", choose, work, Choosing(minimum={"asthetic": 5}))
    user_error("text_detector=", choose, work, Choosing(maximum={"text_area": 0.1}))
    lines = list(choose(work, Choosing(count=50)).lines())
    assert any("ranked by aesthetic" in line for line in lines) and any("fewer than count=50" in line for line in lines)


def test_features_that_overflowed_make_a_row_and_no_crash(clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_samples(tmp_path / "shards", "cat", "dog", "cow")
    real = Clip.image_features

    def overflown(self: Clip, pixels: torch.Tensor) -> torch.Tensor:
        features = real(self, pixels).clone()
        features[1:2] = torch.nan
        return features

    calls = iter([real, overflown])  # the probe, the batch, and then what is left of it
    monkeypatch.setattr(Clip, "image_features", lambda self, pixels: next(calls, real)(self, pixels))
    score_shards(expand_shards(tmp_path / "shards"), tmp_path / "work", Scoring(str(clip_folder)))
    table = load_scores(tmp_path / "work")
    assert table.unreadable.tolist() == [False, True, False]
    report = choose(tmp_path / "work", Choosing(clusters=2, weights={"words": 1.0}))
    assert (report.unreadable, report.chosen) == (1, 2)


def test_clusters_of_many_rows_are_those_of_the_centres_of_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_FITTED", 100)
    monkeypatch.setattr(selection, "_BLOCK", 64)
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 500)
    features = (np.eye(8)[truth] + 0.05 * rng.standard_normal((500, 8))).astype(np.float16)
    found = clusters_of(features, 4, seed=1)
    assert len({(a, b) for a, b in zip(truth, found, strict=True)}) == 4
    assert (found == clusters_of(features, 4, seed=1)).all()
    choice = choose_varied(rng.random(500), features, found, count=8, max_similarity=2.0)
    assert sorted(np.bincount(truth[choice.rows]).tolist()) == [2, 2, 2, 2]
