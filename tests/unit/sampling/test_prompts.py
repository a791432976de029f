"""Reading prompts: formats, order, and one sentence for each kind of bad input."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from commands import user_error

from paradiffusion.errors import UserError
from paradiffusion.sampling.prompts import read_prompts

AWKWARD = 'a "red" circle, {left}; it\'s = 50 % \\ of\nthe picture\u2028’s width'


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_txt_keeps_order_and_skips_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", '\ufeff  first, {a} "b"\r\n\r\n \nsecond\u2028half\nthird')
    requests = read_prompts(prompt_file=path)
    assert [request.prompt for request in requests] == ['first, {a} "b"', "second\u2028half", "third"]
    assert [request.index for request in requests] == [0, 1, 2]
    assert [request.source for request in requests] == ["p.txt line 1", "p.txt line 4", "p.txt line 5"]
    assert requests[0].seed is None and requests[0].negative_prompt is None


def test_jsonl_fields(tmp_path: Path) -> None:
    rows = [
        {"prompt": AWKWARD, "seed": 5, "height": 64, "width": 32.0, "steps": 3, "guidance": 2, "negative_prompt": "x"},
        {"prompt": "plain", "seed": None},
    ]
    path = write(tmp_path, "p.JSONL", "\n".join(map(json.dumps, rows)) + "\n\n")
    first, second = read_prompts(prompt_file=path)
    assert first.prompt == AWKWARD and first.negative_prompt == "x"
    assert (first.seed, first.height, first.width, first.steps, first.guidance) == (5, 64, 32, 3, 2.0)
    assert isinstance(first.width, int) and second.seed is None and second.index == 1


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_csv_fields(tmp_path: Path, mark: str) -> None:
    quoted = '"' + AWKWARD.replace('"', '""') + '"'
    lines = [mark.join(["id", "Prompt", "SEED", "guidance"]), mark.join(["7", quoted, "3", "1.5"])]
    lines += [mark * 3, mark.join(["8", "plain", "", ""])]
    requests = read_prompts(prompt_file=write(tmp_path, "p.csv", "\ufeff" + "\r\n".join(lines)))
    assert [(r.prompt, r.seed, r.guidance) for r in requests] == [(AWKWARD, 3, 1.5), ("plain", None, None)]
    assert requests[1].source == "p.csv line 5"  # the first prompt spans two lines, and one line is blank


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("geneval.jsonl", '{"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "two dogs"}\n{"prompt": "b", "seed": 4}'),
        ("hub.json", '[{"text": "two dogs", "id": 3}, {"text": "b", "seed": 4}]'), ("plain.json", '["two dogs", {"caption": "b", "seed": 4}]'),
        ("p.tsv", "prompt_id\ttext\tseed\n1\ttwo dogs\t\n2\tb\t4\n"), ("p.csv", "category,caption,seed\nx,two dogs,\n,b,4\n"),
    ],
)  # fmt: skip
def test_the_usual_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str) -> None:
    requests = read_prompts(prompt_file=write(tmp_path, name, content))
    assert [(one.prompt, one.seed) for one in requests] == [("two dogs", None), ("b", 4)]
    extra = {"geneval.jsonl": "tag, include", "hub.json": "id", "p.tsv": "prompt_id", "p.csv": "category"}.get(name, "")
    assert (f"passed over: {extra};" in capsys.readouterr().err) == bool(extra)


def test_one_column_of_tabs_holds_commas_and_a_weight_is_no_misspelt_height(tmp_path: Path) -> None:
    (one,) = read_prompts(prompt_file=write(tmp_path, "one.tsv", "prompt\na red circle, and a blue square\n"))
    (two,) = read_prompts(prompt_file=write(tmp_path, "two.csv", "prompt,weight\na,2\n"))
    assert (one.prompt, two.prompt, two.height) == ("a red circle, and a blue square", "a", None)


def test_one_prompt_and_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [request.prompt for request in read_prompts(prompt=AWKWARD)] == [AWKWARD]
    for arguments in ({"prompt_file": "-"}, {"prompt": "-"}):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("ein Kreis\n\nrödlich\n".encode())))
        assert [request.prompt for request in read_prompts(**arguments)] == ["ein Kreis", "rödlich"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", " \n\n", "holds no prompts"), ("p.csv", "prompt,seed\n", "holds no prompts"), ("p.jsonl", "\n", "holds no prompts"),
        ("p.txt", b"good\nb\xe4d\n", "0xe4 in line 2"), ("p.txt", b"good\nb\0d\n", "0x00 in line 2"),
        ("p.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("p.json", "[]", "holds no prompts"), ("p.json", '{"a": 1}', "expected a list of objects"), ("p.md", "x", "ends in .md; expected .txt, .csv, .tsv"), ("p", "x", "without an ending"),
        ("p.csv", "words,seed\na,1\n", "columns words, seed"), ("p.csv", "prompt,widht\na,64\n", "unknown key 'widht'"),
        ("p.tsv", "prompt\tguidence\na\t2\n", "unknown key 'guidence'"), ("p.json", '[{"prompt": "a", "hight": 64}]', "unknown key 'hight'"), ("p.csv", "prompt\na cat, on a mat\n", "line 2 has 2 cells"),
        ("p.csv", 'prompt\n"never closed\n\n', "line 2 is not valid CSV"), ("p.csv", "prompt,seed\na,one\n", "line 2: seed is 'one'"),
        ("p.csv", "prompt,seed\n,1\n", "line 2 has an empty prompt"), ("p.csv", "prompt,seed,Prompt\na,1,b\n", "has 'prompt' twice"),
        ("p.csv", "prompt,caption\n,another text\n", "line 2 has an empty prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": }', "line 2 is not valid JSON"), ("p.jsonl", '["a"]', "line 1 holds"),
        ("p.jsonl", f'{{"prompt": "a", "seed": {"9" * 5000}}}', "line 1 is not valid JSON"),
        ("p.jsonl", '{"prompt": "a", "sed": 1}', "unknown key 'sed'; accepted keys are prompt, seed, height"),
        ("p.jsonl", '{"seed": 1}', "line 1 has an empty prompt"), ("p.jsonl", '{"prompt": 3}', "prompt is 3; expected text"),
        ("p.jsonl", '{"prompt": "\\ud800"}', "half of a character pair"),
        ("p.jsonl", '{"prompt": "a", "steps": "9"}', 'steps is "9"; expected a whole number'),
        ("p.jsonl", '{"prompt": "a", "steps": true}', "steps is true"), ("p.jsonl", '{"prompt": "a", "steps": 0}', "steps is 0"),
        ("p.jsonl", '{"prompt": "a", "height": 64.5}', "height is 64.5"), ("p.jsonl", '{"prompt": "a", "guidance": NaN}', "guidance is NaN"),
        ("p.jsonl", '{"prompt": "a", "seed": 1e300}', "seed is 1e+300"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        read_prompts(prompt_file=write(tmp_path, name, content))
    message = str(caught.value)
    assert expected in message and name in message and "\n" not in message


def test_missing_file_folder_and_no_prompt(tmp_path: Path) -> None:
    user_error(r"missing\.txt does not exist", read_prompts, prompt_file=tmp_path / "missing.txt")
    (tmp_path / "folder.txt").mkdir()
    user_error("cannot be read", read_prompts, prompt_file=tmp_path / "folder.txt")
    user_error("empty prompt", read_prompts, prompt="  ")
    user_error("expected one of", read_prompts)
