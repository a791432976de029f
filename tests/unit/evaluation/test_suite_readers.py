"""The layouts of published suites, each on a small look-alike in our own words, and what is said of damaged ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from programs import script

from paradiffusion.errors import UserError
from paradiffusion.evaluation.suites.load import load_suite
from paradiffusion.evaluation.suites.suite import Suite

DPG_HEAD = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language\n"
)
DPG = DPG_HEAD + (
    'zoo2,A red fox,,1,0,entity,whole,entity - whole (fox),Is there a fox?\n'
    'zoo2,A red fox,,2,1,attribute,color,"attribute - color (fox, red)",Is the fox red?\n'
    'zoo2,A red fox,,3,"1, 2",other,count,"other - count (fox, ==1)",Is there one fox?\n'
    "park1,Two kites,,1,0,entity,whole,entity - whole (kites),Are there kites?\n"
)  # fmt: skip


def load(name: str, path: Path, **arguments: Any) -> Suite:
    return load_suite(name, str(path), **{"allow_other": True, **arguments})


def write_lines(path: Path, *values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), "utf-8")
    return path


def dpg_folder(folder: Path, table: str = DPG) -> Path:
    (folder / "dpg_bench" / "prompts").mkdir(parents=True)
    (folder / "dpg_bench" / "dpg_bench.csv").write_text(table, "utf-8")
    (folder / "dpg_bench" / "prompts" / "zoo2.txt").write_text("A red fox, alone.\n")
    (folder / "dpg_bench" / "prompts" / "park1.txt").write_text("Two kites above.")
    return folder


def test_dpg_bench(tmp_path: Path) -> None:
    suite = load("dpg", dpg_folder(tmp_path))
    fox, kites = suite.prompts
    assert suite.measures == ("dpg",)
    assert (fox.id, fox.text, fox.category) == ("zoo2", "A red fox, alone.", "zoo")
    assert [(q.id, q.parents, q.category, q.detail, q.about) for q in fox.questions] == [
        ("1", (), "entity", "whole", "entity - whole (fox)"),
        ("2", ("1",), "attribute", "color", "attribute - color (fox, red)"),
        ("3", ("1", "2"), "other", "count", "other - count (fox, ==1)"),
    ]
    assert fox.questions[1].text == "Is the fox red?"
    assert fox.meta["dpg"] == {"rows": 0, "row": {"1": 0, "2": 1, "3": 2}}
    assert kites.meta["dpg"] == {"rows": 3, "row": {"1": 3}}
    again = "zoo2,A red fox,,4,0,entity,whole,entity - whole (tail),Is there a tail?\n"
    scattered = load("dpg", dpg_folder(tmp_path / "scattered", DPG + again)).prompts[0]
    assert scattered.meta["dpg"] == {"rows": 0, "row": {"1": 0, "2": 1, "3": 2, "4": 4}, "last_block": 4}
    untidy = dpg_folder(tmp_path / "untidy", DPG.replace("entity - whole (kites)", '"whole" (kites)'))
    assert load("dpg", untidy).prompts[1].questions[0].about == "whole (kites)"
    assert [p.id for p in load("dpg", tmp_path / "dpg_bench" / "dpg_bench.csv").prompts] == ["zoo2", "park1"]


def test_damaged_dpg_bench(tmp_path: Path) -> None:
    folder = dpg_folder(tmp_path / "a")
    with pytest.raises(UserError, match="2 prompts were found; expected 1065"):
        load_suite("dpg", str(folder))
    (folder / "dpg_bench" / "prompts" / "lost.txt").write_text("Nobody asks.")
    with pytest.raises(UserError, match="lost.txt has no questions"):
        load_suite("dpg", str(folder))
    (folder / "dpg_bench" / "prompts" / "zoo2.txt").unlink()
    with pytest.raises(UserError, match="zoo2.txt, which dpg_bench.csv asks about, is missing"):
        load_suite("dpg", str(folder))
    cases = {
        DPG.replace('"1, 2"', "one"): r"row 3 \(line 4\): dependency is 'one'",
        DPG.replace(",2,1,", ",x,1,"): "proposition_id is 'x'",
        DPG[:-30]: r"row 4 \(line 5\) has 8 cells, the header 9|empty",
        DPG.replace("zoo2,A red fox,,2", ",A red fox,,2"): r"row 2 \(line 3\) has an empty item_id",
        DPG.replace("tuple", "triple"): "expected one named tuple",
        DPG_HEAD: "holds no prompts",
        DPG + '"': r"line 6 is not valid CSV",
    }
    for number, (table, words) in enumerate(cases.items()):
        with pytest.raises(UserError, match=words) as caught:
            load("dpg", dpg_folder(tmp_path / str(number), table))
        assert "\n" not in str(caught.value)


def test_geneval(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "prompts" / "evaluation_metadata.jsonl",
        {"tag": "counting", "include": [{"class": "owl", "count": 3}], "exclude": [{"class": "owl", "count": 4}],
         "prompt": "three owls"},
        {"tag": "position", "include": [{"class": "cup", "count": 1},
                                        {"class": "apple", "count": 1, "color": "red", "position": ["left of", 0]}],
         "prompt": "a red apple left of a cup"},
    )  # fmt: skip
    suite = load("geneval", tmp_path)
    owls, apple = suite.prompts
    assert "detector" in suite.source and [p.id for p in suite.prompts] == ["00000", "00001"]
    assert owls.category == "counting" and owls.meta["exclude"] == [{"class": "owl", "count": 4}]
    assert [(q.id, q.text, q.parents) for q in owls.questions] == [
        ("1", "Is there an owl in the picture?", ()),
        ("1.count", "Are there exactly 3 of these in the picture: owl?", ("1",)),
    ]
    assert [(q.text, q.parents) for q in apple.questions if q.parents] == [
        ("Look at the apple in the picture: is its colour red?", ("2",)),
        ("Is the apple to the left of the cup in the picture?", ("2", "1")),
    ]
    write_lines(
        tmp_path / "prompts" / "evaluation_metadata.jsonl", {"tag": "a", "include": [{"name": "owl"}], "prompt": "b"}
    )
    with pytest.raises(UserError, match="line 1: include is"):
        load("geneval", tmp_path)


def test_vilg(tmp_path: Path) -> None:
    table = '\ufeffPrompt,文本,类别,来源\n"A blue\ncup.",蓝色的杯子。,颜色,Mine\nA moon,月亮,地理类,Mine\n'
    (tmp_path / "ViLG-300.csv").write_text(table, "utf-8")
    cup, moon = load("vilg", tmp_path).prompts
    assert (cup.text, cup.category, moon.id) == ("A blue cup.", "colours", "00001")
    assert cup.meta == {"chinese": "蓝色的杯子。", "origin": "Mine"}
    assert load("vilg_zh", tmp_path).prompts[1].text == "月亮"
    assert load("vilg", tmp_path, options={"language": "zh"}).name == "vilg_zh"
    with pytest.raises(UserError, match="vilg_fr is unknown"):
        load("vilg", tmp_path, options={"language": "fr"})


def test_coco(tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg"} for i in range(1, 61)]
    captions = [{"id": 900 - i, "image_id": i, "caption": f"the lower id of {i}.\n"} for i in range(1, 61)]
    captions += [{"id": 2000 + i, "image_id": i, "caption": "another"} for i in range(1, 61)]
    captions += [{"id": 1, "image_id": 5, "caption": " "}]
    values = {"info": {}, "images": images, "annotations": captions}
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_val2014.json").write_text(json.dumps(values))
    suite = load("coco", tmp_path)
    assert len(suite.prompts) == 60 and all(p.text == f"the lower id of {p.meta['image_id']}." for p in suite.prompts)
    assert suite.prompts[0].id == Path(suite.prompts[0].meta["file_name"]).stem
    few = load("coco", tmp_path, count=9)
    # The same ones each time, at random over the file, and a smaller choice begins a larger one.
    assert len(few.prompts) == 9 and few.prompts == suite.prompts[:9]
    assert {p.meta["image_id"] for p in few.prompts} != set(range(1, 10))
    with pytest.raises(UserError, match="60 prompts were found; expected 40504"):
        load_suite("coco", str(tmp_path))
    file = tmp_path / "half.json"
    file.write_text(json.dumps(values)[:300])
    with pytest.raises(UserError, match="half.json is not whole JSON"):
        load("coco", file)
    file.write_text('{"images": []}')
    with pytest.raises(UserError, match="no file of COCO's captions.*annotations"):
        load("coco", file)


def test_short_and_long_pairs(tmp_path: Path) -> None:
    rows = [{"type": f"t{i % 2}", "short_description": f"s {i}", "long_description": f"l l {i}"} for i in range(6)]
    write_lines(tmp_path / "TIIF" / "data" / "testmini_prompts" / "a.jsonl", *rows[:4])
    write_lines(tmp_path / "TIIF" / "data" / "testmini_prompts" / "b.jsonl", *rows[4:])
    suite = load("tiif", tmp_path)
    assert [p.id for p in suite.prompts] == [f"0000{i}_{v}" for v in ("short", "long") for i in range(6)]
    assert suite.prompts[7].text == "l l 1" and suite.prompts[7].category == "t1"
    assert suite.prompts[7].meta == {"pair": "00001", "version": "long"}
    chosen = load("tiif", tmp_path, count=4).prompts
    assert [p.meta["pair"] for p in chosen] == ["00000", "00003", "00000", "00003"]
    assert load("tiif", tmp_path / "TIIF" / "data" / "testmini_prompts").fingerprint == suite.fingerprint


def test_long_texts_in_json(tmp_path: Path) -> None:
    write_lines(tmp_path / "captions" / "en" / "long_text.jsonl", {"prompt": "A long one."}, {"prompt": "Another."})
    assert [p.text for p in load("prism_long", tmp_path).prompts] == ["A long one.", "Another."]
    (tmp_path / "lpg.json").write_text(json.dumps({"prompts": [{"Prompt ": "A hill.", "n": 1}]}))
    assert load("lpg", tmp_path / "lpg.json").prompts[0].text == "A hill."
    for values, words in (
        ([{"text": "a"}], "entry 1 has the keys text; expected one named prompt"),
        ([{"prompt": ""}], "entry 1 has an empty prompt"),
        ([{"prompt": ["a"]}], "prompt is .*expected text"),
        ([{"prompt": "\ud83c"}], "half of a character pair"),
        (["a"], "entry 1 is no object"),
        ({"a": [], "b": []}, "2 lists"),
    ):
        (tmp_path / "lpg.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match=words):
            load("lpg", tmp_path / "lpg.json")


def test_detailmaster(tmp_path: Path) -> None:
    row = {
        "image_id": "7.jpg", "polished_prompt": "A jug on a shelf.", "dataset_target": "ours",
        "character_attributes": [{"main_character": "jug", "characteristics_list": ["color:blue", "tall"], "cls": "object"}],
        "character_locations": [{"main_character": "jug", "bbox": [0, 0, 1, 1], "position": "The upper part of the image"},
                                {"main_character": "shelf", "position": "The middle part of the image"}],
        "scene_attributes": [{"scene_attribute": "light", "content": "It is dim."},
                             {"scene_attribute": "spatial", "content": ["The jug is on the shelf.",
                              "[\"['one' is left.]\", \"['two' is right.]\"]"]}],
    }  # fmt: skip
    rows = [row, {**row, "polished_prompt": "The same again."}]
    (tmp_path / "DetailMaster_Dataset.json").write_text(json.dumps(rows))
    first, second = load("detailmaster", tmp_path).prompts
    assert (first.id, second.id, first.category) == ("ours_7", "ours_7-2", "ours")
    asked = {q.id: (q.category, q.about, q.parents) for q in first.questions}
    assert asked["1.attribute.1"] == ("attribute", "color: blue", ("1",))
    assert asked["2"][1] == "shelf" and asked["2.location.1"][2] == ("2",)
    assert asked["light.1"] == ("scene", "It is dim.", ())
    spatial = [asked[f"spatial.{n}"][1] for n in (1, 2, 3)]
    assert spatial == ["The jug is on the shelf.", "one' is left.", "two' is right."]


def test_download_says_where_and_checks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main, folder = script("download").main, dpg_folder(tmp_path / "mine")
    for arguments, words in (
        (["what=suites"], ["paraprompts ", "TencentQQGYLab/ELLA", "licence: none published", "size: "]),
        (["what=dpg"], ["TencentQQGYLab/ELLA", "licence: ", "git clone", "is not in data/suites/dpg yet"]),
        (["what=dpg", f"to={folder}", "allow_other=true"], ["2 prompts of 3 to 4 words"]),
    ):
        assert main(arguments) == 0
        said = capsys.readouterr().out
        assert all(word in said for word in words), said
    with pytest.raises(UserError, match="expected 1065"):
        main(["what=dpg", f"check={folder}"])
    with pytest.raises(UserError, match="what=suites lists them"):
        main(["what=llm", "check=here"])
