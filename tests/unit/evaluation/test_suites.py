"""Suites of prompts: ParaPrompts-400, suites of one's own, the layouts of published ones, and what is said of damaged files."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, user_error
from programs import script

from paradiffusion.errors import UserError
from paradiffusion.evaluation.suites.load import FORMATS, load_suite, suites
from paradiffusion.evaluation.suites.suite import BAND_NAMES, MAX_BYTES, Suite, SuitePrompt, safe_ids
from paradiffusion.evaluation.suites.suite_table import TABLE, read_table, what_it_holds, where_from
from paradiffusion.scenes.dataset import demo_samples
from paradiffusion.scenes.world import scene_from_meta

ASSETS = ROOT.parent / "shared" / "assets" / "paraprompts"
CATEGORIES = {
    "Others": 68, "Outdoor Scenes": 55, "Indoor Scenes": 54, "Vehicles": 52, "Food": 48, "Human": 47, "Arts": 45, "Animals": 30,
}  # fmt: skip


@pytest.fixture
def paraprompts(tmp_path: Path) -> Path:
    """A copy of the released files, to be spoilt."""
    if not ASSETS.is_dir():
        pytest.skip("needs ../shared/assets/paraprompts, which may not be shipped")
    folder = tmp_path / "paraprompts"
    shutil.copytree(ASSETS, folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "ParaPrompts_400.csv").open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def spoil(folder: Path, change: Callable[[list[dict[str, str]]], list[dict[str, str]]]) -> None:
    """Write the table again, changed."""
    rows = change(rows_of(folder))
    with (folder / "ParaPrompts_400.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def setting(number: int, **values: str) -> Callable[[list[dict[str, str]]], list[dict[str, str]]]:
    return lambda rows: [{**row, **(values if at == number else {})} for at, row in enumerate(rows)]


def test_paraprompts_is_whole(paraprompts: Path) -> None:
    suite = load_suite("paraprompts", str(paraprompts))
    assert len(suite.prompts) == 399 and Counter(p.category for p in suite.prompts) == CATEGORIES
    listed = [prompt for prompt in suite.prompts if prompt.questions]
    assert {p.id for p in listed} == {file.stem for file in (paraprompts / "parts_50").iterdir()} and len(listed) == 51
    assert (min(p.words for p in suite.prompts), max(p.words for p in suite.prompts)) == (56, 294)
    for prompt in listed:
        ids = [question.id for question in prompt.questions]
        objects = json.loads((paraprompts / "parts_50" / f"{prompt.id}.json").read_text(encoding="utf-8"))
        assert len(set(ids)) == len(ids)
        assert [q.about for q in prompt.questions if q.category == "entity"] == list(objects)
        for one in prompt.questions:
            assert one.category in ("entity", "attribute", "location")
            assert one.parents == () if one.category == "entity" else len(one.parents) == 1 and one.parents[0] in ids
    # The file may be named itself, and lines that a spreadsheet ended otherwise are the same prompts.
    spoil(paraprompts, lambda rows: rows)
    assert load_suite("paraprompts", str(paraprompts / "ParaPrompts_400.csv")).fingerprint == suite.fingerprint
    chinese = load_suite("paraprompts_zh", str(paraprompts))
    assert chinese.prompts[0].id == suite.prompts[0].id and not chinese.prompts[0].text.isascii()
    shutil.rmtree(paraprompts / "parts_50")
    assert not any(prompt.questions for prompt in load_suite("paraprompts", str(paraprompts)).prompts)


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_suite("paraprompts", str(folder))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[:17] + rows[18:], ["398 prompts", "row 18, ", "expected 399", "allow_other=true"]),
        (lambda rows: rows[:-1], ["398 prompts", "row 399 is the first that is missing"]),
        (setting(200, Prompt="A cat."), ["row 201", "SHA-256"]),
        (setting(3, Category="Food"), ["category", "were found", "expected"]),
        (setting(3, Prompt=" "), ["line ", "empty Prompt"]),
        (lambda rows: [{k: v for k, v in row.items() if k != "Category"} for row in rows], ["expected one named Category"]),
    ],
    ids=["gap", "end", "text", "category", "empty", "column"],
)  # fmt: skip
def test_a_wrong_paraprompts_is_refused_with_the_difference_named(paraprompts: Path, change: Any, words: list[str]) -> None:
    spoil(paraprompts, change)
    refused(paraprompts, *words)
    if words[-1] == "SHA-256":
        assert len(load_suite("paraprompts", str(paraprompts), allow_other=True).prompts) == 399


def test_a_wrong_checklist_is_refused(paraprompts: Path) -> None:
    checklist = sorted((paraprompts / "parts_50").iterdir())[0]
    text = checklist.read_text(encoding="utf-8")
    checklist.write_text(text[: len(text) // 2], encoding="utf-8")
    refused(paraprompts, checklist.name, "not whole JSON")
    checklist.write_text('{"Tower": "tall"}', encoding="utf-8")
    refused(paraprompts, checklist.name, "no checklist")
    checklist.unlink()
    refused(paraprompts, "50 checklists", "expected 51")
    (paraprompts / "parts_50" / "ffff.json").write_text(text, encoding="utf-8")
    refused(paraprompts, "ffff.json has no prompt")


def test_checklists_become_questions_in_our_words(tmp_path: Path) -> None:
    (tmp_path / "Parts_50").mkdir()
    table = '\ufeffImage,Prompt,Category\nA.JPEG,"Two men, a TV",Human\nb.png,A hill,Others\n'
    (tmp_path / "mine.csv").write_text(table, "utf-8")
    checklist = {
        "Man 1": {"Attributes": "Tall", "Locations": "not specified"},
        "Man 2": {"Attribute": "n/a", "Location": "By the TV"},
        "LCD TV": {"Attributes": {"Screen": {"Colour": ["blue", "green"]}, "State": "on"}, "Locations": {}},
        "Chair (Left)": {"Attributes": None},
    }
    (tmp_path / "Parts_50" / "a.json").write_text(json.dumps(checklist))
    suite = load_suite("paraprompts", str(tmp_path), allow_other=True)
    assert [(q.id, q.text, q.parents) for q in suite.prompts[0].questions] == [
        ("1", "Does the picture show this: man?", ()),
        ("1.attribute", "Look at each man in the picture: is one of them like this: tall?", ("1",)),
        ("2", "Does the picture show at least 2 of these: man?", ()),
        ("2.location", "Look at each man in the picture: is one of them here: by the TV?", ("2",)),
        ("3", "Does the picture show this: LCD TV?", ()),
        ("3.attribute.1", "Look at the LCD TV in the picture: is it like this: screen, colour: blue and green?", ("3",)),
        ("3.attribute.2", "Look at the LCD TV in the picture: is it like this: state: on?", ("3",)),
        ("4", "Does the picture show this: chair (left)?", ()),
    ]  # fmt: skip
    assert suite.prompts[1].questions == () and suite.prompts[1].category == "Others"


def test_scenes_are_those_of_validation() -> None:
    suite = load_suite("scenes")
    assert len(suite.prompts) == 200 and suite.measures == ("scenes",)
    for prompt, sample in zip(suite.prompts[:20], demo_samples("val", 20), strict=True):
        assert (prompt.id, prompt.text) == (sample.key, sample.meta["captions"]["clean"])
        assert scene_from_meta(prompt.meta["scene"]) == scene_from_meta(sample.meta)
        assert (prompt.height, prompt.width) == (sample.meta["height"], sample.meta["width"])
        assert int(prompt.category.split()[0]) == len(sample.meta["objects"])
    assert load_suite("scenes", count=7).prompts == suite.prompts[:7]
    larger = load_suite("scenes", count=3, options={"scale": 2, "caption": "long"}).prompts[1]
    assert larger.height == 2 * (suite.prompts[1].height or 0) and larger.text != suite.prompts[1].text
    large = load_suite("scenes", count=5, options={"world": "large", "caption": "unseen"}).prompts
    for prompt, sample in zip(large, demo_samples("val", 5, world="large"), strict=True):
        assert prompt.text == sample.meta["captions"]["unseen"] and (prompt.height, prompt.width) == (96, 96)
    for options, words in (({"caption": "loud"}, "clean"), ({"caption": "unseen", "set": "web"}, "set=val"),
                           ({"scale": 0}, "1 up"), ({"size": 2}, "unknown"), ({"lengths": [0]}, "lengths"),
                           ({"lengths": [50], "by": "words"}, "idle, or objects"), ({"by": "objects"}, "with lengths"),
                           ({"number": 2, "lengths": [40, 300], "by": "objects"}, "about 300 words, the longest")):  # fmt: skip
        user_error(words, load_suite, "scenes", options=options)


def test_scenes_at_several_lengths_are_the_same_scenes_in_longer_paragraphs() -> None:
    own = {prompt.id: prompt for prompt in load_suite("scenes", options={"world": "large", "number": 12}).prompts}
    options = {"world": "large", "number": 12, "lengths": [40, 120, 400]}
    prompts = load_suite("scenes", options=options).prompts
    assert load_suite("scenes", options=options).prompts == prompts
    assert Counter(p.category for p in prompts)["400 words"] == 12
    for prompt in prompts:
        name, words = prompt.id.rsplit("-", 1)
        assert prompt.category == f"{words} words" and int(words) <= prompt.words < int(words) + 20
        assert own[name].text in prompt.text and own[name].meta == prompt.meta
    shorter = {prompt.id for prompt in prompts if prompt.category == "40 words"}
    assert shorter == {f"{name}-40" for name, prompt in own.items() if prompt.words <= 40}
    before = [p.text.index(own[p.id.rsplit("-", 1)[0]].text) / len(p.text) for p in prompts if p.words >= 400]
    assert min(before) > 0.1 and max(before) < 0.7  # it stands in the midst


def test_longer_paragraphs_of_more_objects() -> None:
    options = {"world": "large", "number": 6, "lengths": [120, 40], "by": "objects"}
    prompts = load_suite("scenes", options=options).prompts
    assert load_suite("scenes", options=options).prompts == prompts
    assert [p.category for p in prompts] == ["120 words"] * 6 + ["40 words"] * 6
    objects: dict[str, list[int]] = {"120 words": [], "40 words": []}
    own = {p.id: p for p in load_suite("scenes", options={"world": "large", "number": 300}).prompts}
    for prompt in prompts:
        name, words = prompt.id.rsplit("-", 1)
        assert abs(prompt.words - int(words)) <= int(words) / 8
        assert (prompt.text, prompt.meta) == (own[name].text, own[name].meta), "nothing is put around it"
        objects[prompt.category].append(len(prompt.meta["scene"]["objects"]))
    assert min(objects["120 words"]) > max(objects["40 words"])


def test_scenes_that_people_described(tmp_path: Path) -> None:
    file = ROOT / "data" / "paragraphs.jsonl"
    prompts = load_suite("scenes", path=str(file)).prompts
    assert len(prompts) == 40 and prompts[0].text.startswith("My niece") and prompts[0].category == "1 object"
    assert (prompts[0].height, prompts[39].width, prompts[39].category) == (64, 96, "9 objects")
    assert scene_from_meta(prompts[39].meta["scene"]).objects[-1].shape == "square"
    assert load_suite("scenes", path=str(file), count=3).prompts == prompts[:3]
    broken = tmp_path / "broken.jsonl"
    for text in ("words", '{"text": "a"}', "[1]"):
        broken.write_text(text)
        user_error("broken.jsonl", load_suite, "scenes", path=str(broken))
    user_error("missing.jsonl", load_suite, "scenes", path=str(tmp_path / "missing.jsonl"))


@pytest.mark.parametrize(
    "names",
    [
        ["a", "a", "A", "a-2", "b c", "b/c", "../x", "", ".", "-", "é" * 80, "x" * 300, "x" * 300, "CON.", "漢字"],
        ["cat", "cat_1", "cat_10", "dog_1"],
        ["a-2", "a", "a", "a"],
    ],
)
def test_names_are_distinct_and_safe_as_files(names: list[str], tmp_path: Path) -> None:
    made = safe_ids(names)
    assert len({name.casefold() for name in made}) == len(names)
    assert all(len(name.encode()) <= MAX_BYTES and not set(name) - set(map(chr, range(45, 123))) for name in made)
    assert not {f"{name}_{number}".casefold() for name in made for number in range(1, 20)} & {m.casefold() for m in made}
    for name in made:
        (tmp_path / f"{name}.png").touch()
    assert len(list(tmp_path.iterdir())) == len(names) and safe_ids(made) == made
    # A name does not depend on what stands beside it, but where names are equal.
    assert {safe_ids([name])[0] for name in ("b c", "b/c", "../x")} <= set(safe_ids(["b c", "b/c", "../x", "b_c"]))


def test_the_table_is_whole() -> None:
    entries = read_table()
    assert list(entries) == suites()
    assert {*["scenes", "paraprompts", "dpg", "geneval", "vilg", "coco", "tiif", "prism_long", "lpg", "detailmaster"]} <= set(entries)
    for entry in entries.values():
        assert entry.format in FORMATS and entry.title and entry.source and entry.licence
        assert entry.format == "scenes" or (entry.get and entry.size and entry.path == f"data/suites/{entry.path[12:]}")
        assert entry.name in where_from(entry)


def test_seeds_bands_and_prompts_stay_what_they_are() -> None:
    suite = load_suite("scenes", count=2)
    # Known answers: were they to change, no picture of an earlier evaluation could be compared with a later one.
    assert [prompt.seed(suite.name) for prompt in suite.prompts] == [1449654922, 965190323]
    assert suite.fingerprint == "1c63371b577cfbfe"
    assert suite.prompts[0].seed("other") != suite.prompts[0].seed(suite.name)
    names = [SuitePrompt("a", " ".join(["word"] * n)).band for n in (1, 25, 26, 77, 78, 128, 129, 256, 257)]
    assert names == [BAND_NAMES[i] for i in (0, 0, 1, 1, 2, 2, 3, 3, 4)]


def test_a_suite_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my prompts"
    (folder / "animals").mkdir(parents=True)
    (folder / "hill.txt").write_text("A hill\nwith a tree.\n", "utf-8")
    (folder / "animals" / "cat.txt").write_text("A cat.", "utf-8")
    suite = load_suite(str(folder))
    assert [(p.id[:11], p.category) for p in suite.prompts] == [("animals-cat", "animals"), ("hill", "")]
    assert suite.prompts[1].text == "A hill\nwith a tree." and suite.prompts[0].meta == {"original_id": "animals/cat"}
    file = tmp_path / "cases.jsonl"
    file.write_text('{"prompt": "a red ring", "height": 64, "width": 80, "seed": 3}\n{"prompt": "a star"}\n')
    first, second = load_suite(str(file)).prompts
    assert (first.id, first.height, first.width, first.meta) == ("00000", 64, 80, {"line": {"seed": 3}})
    assert second.id == "00001" and second.meta == {} and second.height is None
    own = tmp_path / "own.yaml"
    own.write_text("cases: {format: prompt_file, path: cases.jsonl, title: Mine}\n")
    monkeypatch.chdir(ROOT)  # paths in it are from its own folder
    assert load_suite(str(own)).title == "Mine" and load_suite(str(own)).name == "cases"
    own.write_text("hills: {format: folder, path: my prompts}\ncases: {format: folder, path: my prompts}\n")
    user_error("holds hills, cases", load_suite, str(own))
    own.write_text("format: folder\npath: my prompts\nexpected: {prompts: 3}\n")
    user_error("2 prompts were found; expected 3.*allow_other=true", load_suite, str(own))
    assert load_suite(str(own), allow_other=True).name == "own"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "no YAML"), ("- a", "no table"), ("x: {path: here}", "names no format"),
        ("x: {format: folder, pth: here}", "did you mean path"), ("x: {format: folder, path: 3}", "path is 3"),
        ("x: {format: folders, path: .}", "format=folders is unknown; choose one of paraprompts"),
        ("x: {format: folder, path: ., options: {deep: 1}}", "'deep' is unknown"),
        ("x: {format: folder, path: ., expected: {prompts: many}}", "valid integer"),
        ("x: {format: folder, path: nowhere}", "nowhere does not exist"), ("x: {format: folder, path: empty}", "holds no prompts"),
        ("x: {format: folder, path: blank}", "nothing.txt is empty"), ("x: {format: folder, path: zeros}", "0x00 in line 1"),
        ("x: {format: folder, path: latin}", "not UTF-8: byte 0xe9 in line 2"), ("'a/b': {format: folder, path: .}", "becomes a folder's"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_ones_own(tmp_path: Path, text: str, words: str) -> None:
    for name in ("empty", "blank", "latin", "zeros"):
        (tmp_path / name).mkdir()
    (tmp_path / "blank" / "nothing.txt").write_text(" \n")
    (tmp_path / "latin" / "cafe.txt").write_bytes(b"one\ncaf\xe9\n")
    (tmp_path / "zeros" / "cat.txt").write_bytes(b"A cat\0")
    file = tmp_path / "own.yaml"
    file.write_text(text)
    user_error(words, load_suite, str(file))


def test_unknown_names_and_counts(tmp_path: Path) -> None:
    user_error("did you mean paraprompts", load_suite, "paraprompt")
    user_error(r"does not exist.*what=dpg.*suite_path=", load_suite, "dpg", str(tmp_path / "none"))
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {i}" for i in range(10)))
    chosen = load_suite(str(tmp_path / "p.txt"), count=4)
    assert [p.id for p in chosen.prompts] == ["00000", "00002", "00005", "00007"]  # spread over the list
    assert "4 prompts of 2 to 2 words" in what_it_holds(chosen)
    assert TABLE == ROOT / "configs" / "suites.yaml"


DPG_HEAD = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language\n"
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
    user_error("2 prompts were found; expected 1065", load_suite, "dpg", str(folder))
    (folder / "dpg_bench" / "prompts" / "lost.txt").write_text("Nobody asks.")
    user_error("lost.txt has no questions", load_suite, "dpg", str(folder))
    (folder / "dpg_bench" / "prompts" / "zoo2.txt").unlink()
    user_error("zoo2.txt, which dpg_bench.csv asks about, is missing", load_suite, "dpg", str(folder))
    cases = {
        DPG.replace('"1, 2"', "one"): "line 4: dependency is 'one'",
        DPG.replace(",2,1,", ",x,1,"): "proposition_id is 'x'",
        DPG[:-30]: r"line 5 .*8 cells, the header has 9|empty",
        DPG.replace("zoo2,A red fox,,2", ",A red fox,,2"): "line 3 has an empty item_id",
        DPG.replace("tuple", "triple"): "expected one named tuple",
        DPG_HEAD: "holds no prompts",
        DPG + '"': r"line 6 .*1 cells, the header has 9",
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
    write_lines(tmp_path / "prompts" / "evaluation_metadata.jsonl", {"tag": "a", "include": [{"name": "owl"}], "prompt": "b"})
    user_error("line 1: include is", load, "geneval", tmp_path)


def test_vilg(tmp_path: Path) -> None:
    table = '\ufeffPrompt,文本,类别,来源\n"A blue\ncup.",蓝色的杯子。,颜色,Mine\nA moon,月亮,地理类,Mine\n'
    (tmp_path / "ViLG-300.csv").write_text(table, "utf-8")
    cup, moon = load("vilg", tmp_path).prompts
    assert (cup.text, cup.category, moon.id) == ("A blue cup.", "colours", "00001")
    assert cup.meta == {"chinese": "蓝色的杯子。", "origin": "Mine"}
    assert load("vilg_zh", tmp_path).prompts[1].text == "月亮"
    assert load("vilg", tmp_path, options={"language": "zh"}).name == "vilg_zh"
    user_error("vilg_fr is unknown", load, "vilg", tmp_path, options={"language": "fr"})


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
    user_error("60 prompts were found; expected 40504", load_suite, "coco", str(tmp_path))
    file = tmp_path / "half.json"
    file.write_text(json.dumps(values)[:300])
    user_error("half.json is not whole JSON", load, "coco", file)
    file.write_text('{"images": []}')
    user_error("no file of COCO's captions.*annotations", load, "coco", file)


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
        ([{"text": "a"}], "entry 1 has the columns text; expected one named prompt"),
        ([{"prompt": ""}], "entry 1 has an empty prompt"),
        ([{"prompt": ["a"]}], "prompt is .*expected text"),
        ([{"prompt": "\ud83c"}], "half of a character pair"),
        (["a"], "entry 1 is no object"),
        ({"a": [], "b": []}, "2 lists"),
    ):
        (tmp_path / "lpg.json").write_text(json.dumps(values))
        user_error(words, load, "lpg", tmp_path / "lpg.json")


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


def test_download_says_where_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
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
    user_error("expected 1065", main, ["what=dpg", f"check={folder}"])
    user_error("what=suites lists them", main, ["what=llm", "check=here"])
