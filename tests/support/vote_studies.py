"""Small studies of votes for the tests: sets of pictures with names that no rater may learn."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from paradiffusion.evaluation.records import Drawn, Evaluation, write_evaluation
from paradiffusion.evaluation.suites.suite import Suite, SuitePrompt
from paradiffusion.evaluation.votes.vote_actions import VoteOptions, open_study
from paradiffusion.evaluation.votes.vote_store import Vote
from paradiffusion.evaluation.votes.vote_study import Pair, PictureSet, Question, Study, Task, VotedPrompt

SECRET = "zebrafish"  # part of every set's name, and of what the pictures' files say besides their pixels
HOSTILE = "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'> & \u202e a lamp"
LONG = "A narrow street climbs between two rows of blue houses, and a cat sleeps on the third step. " * 9


def suite_of(count: int, name: str = "streets") -> Suite:
    """A suite with long prompts, the first of them hostile, in two categories."""
    texts = [HOSTILE, *(f"Number {number}. {LONG}" for number in range(1, count))]
    prompts = [SuitePrompt(f"street-{n:02d}", text, ("Food", "Animals")[n % 2]) for n, text in enumerate(texts)]
    return Suite(name, "Streets", tuple(prompts))


def write_picture(path: Path, number: int, size: tuple[int, int] = (96, 64)) -> None:
    """A picture of its own, whose file says whose it is in text, EXIF and ICC chunks."""
    info = PngInfo()
    info.add_text("parameters", f"checkpoint {SECRET}")
    info.add_itxt("Software", SECRET)
    exif = Image.Exif()
    exif[0x010E] = SECRET
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, pnginfo=info, exif=exif, icc_profile=SECRET.encode())


def evaluation_of(folder: Path, suite: Suite, missing: dict[str, str] | None = None, seed: int = 0, per: int = 1) -> Path:
    """An evaluation with pictures; ``missing`` says why some prompts have none."""
    images = []
    for row, prompt in enumerate(suite.prompts):
        for number in range(per):
            error = (missing or {}).get(prompt.id, "")
            file = folder / "images" / (f"{row:05d}_{number}.png" if number else f"{row:05d}.png")
            if not error:
                write_picture(file, seed * 1000 + row * 10 + number)
            images.append(Drawn(f"{prompt.id}_{number}", prompt.id, file, number, error))
    write_evaluation(folder, Evaluation(folder.name, "checkpoint", {}, suite, per, images))
    return folder


def study_of(root: Path, prompts: int = 6, sets: int = 2, missing: dict[str, str] | None = None, **options: Any) -> Study:
    """A study in ``root``/votes whose sets are evaluations; ``missing`` pictures are the first set's."""
    suite = suite_of(prompts)
    folders = {
        f"{SECRET}-{number}": evaluation_of(root / f"{SECRET}-{number}", suite, missing if not number else None, number)
        for number in range(sets)
    }
    values = {"raters": "[anna, ben]", "sets": json.dumps({name: str(path) for name, path in folders.items()})}
    made = VoteOptions(action="serve", study=str(root / "votes"), **{**values, **options})
    made.check()
    return open_study(made)


def virtual_study(prompts: int, sets: list[str], raters: int, repeats: int = 1, seed: int = 0) -> Study:
    """A study without files, of one question, for simulations."""
    from paradiffusion.evaluation.votes.vote_study import Picture, all_pairs, assign

    ids = [f"p{number}" for number in range(prompts)]
    pairs = all_pairs(ids, sets, 1)
    names = [f"rater {number}" for number in range(raters)]
    return Study(
        folder=Path("nowhere"), title="t", suite="s", settings={}, ask="separately",
        questions=(Question("faithfulness", "Which?"),),
        prompts={one: VotedPrompt(one, "text", f"c{n % 3}", ("26-77", "78-128")[n % 2]) for n, one in enumerate(ids)},
        sets={name: PictureSet(name, Path("nowhere"), {one: [Picture("x.png", "0")] for one in ids}) for name in sets},
        pairs=pairs,
        tasks=assign(pairs, names, repeats, 1, 0, seed),
    )  # fmt: skip


def votes_for(study: Study, strengths: dict[str, float], tie: float, rng: np.random.Generator, spread: float = 0.0) -> list[Vote]:
    """Votes as Davidson's model casts them; ``spread`` of what each prompt adds to the first set's advantage."""
    shift: dict[Any, float] = {}
    votes = []
    for rater, tasks in study.tasks.items():
        for task in tasks:
            pair = study.pairs[task.pair]
            extra = shift.setdefault((pair.prompt, pair.set_a, pair.set_b), spread * rng.normal())
            choice = drawn_choice(pair, strengths, tie, rng, extra)
            votes.append(vote_for(task, rater, choice))
    return votes


def drawn_choice(pair: Pair, strengths: dict[str, float], tie: float, rng: np.random.Generator, extra: float = 0) -> str:
    """One answer, a, b or tie."""
    apart = (strengths[pair.set_a] - strengths[pair.set_b] + extra) / 2
    odds = np.exp([apart, -apart, tie])
    return ("a", "b", "tie")[rng.choice(3, p=odds / odds.sum())]


def vote_for(task: Task, rater: str, choice: str, question: str = "faithfulness", seconds: float = 2.0) -> Vote:
    """The vote by which ``rater`` says ``choice`` in ``task``."""
    side = "tie" if choice == "tie" else "left" if (choice == "a") != task.flipped else "right"
    return Vote(rater, task.key, question, side, 1, seconds)


def pixels_of(data: bytes) -> bytes:
    """The decoded pixels of an encoded picture."""
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB").tobytes()
