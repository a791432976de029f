"""Scores of pictures against the built-in scenes of their paragraphs, and the tables of a stage's scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from paradiffusion.errors import UserError
from paradiffusion.evaluation.estimates import mean
from paradiffusion.evaluation.scores.sentence_judges import third
from paradiffusion.metrics.sentences import sentences
from paradiffusion.scenes.judge import SceneScore, by_objects, score, summarise
from paradiffusion.scenes.sentence_truth import follow, read_scene
from paradiffusion.scenes.world import Scene, scene_from_meta
from paradiffusion.training.validation import HeldOut

Shares = dict[str, dict[str, float]]
MEASURES = ("colour_at_place", "binding", "shape", "colour_and_shape", "background", "all_colours", "all_right")
HEAD = ("", "steps", "time", "loss short", "loss long", *(name.replace("_", " ") for name in MEASURES))


class SceneScorer:
    """What the trainer asks about pictures of built-in scenes: a ``Scorer`` of training/validation.py."""

    def knows(self, item: HeldOut) -> bool:
        try:
            scene_from_meta(item.meta)
        except UserError:
            return False
        return True

    def followed(self, items: Sequence[HeldOut], pictures: Sequence[np.ndarray]) -> dict[str, float]:
        """The shares of ``sentence_recall``, as "sentences_first" and so on."""
        recall = sentence_recall([item.paragraph for item in items], _scenes(items), pictures)
        return {f"sentences_{part}": found["share"] for part, found in recall.items()}

    def binding(self, items: Sequence[HeldOut], pictures: Sequence[np.ndarray]) -> float | None:
        found = summarise(_scores(_scenes(items), pictures)).get("binding")
        return None if found is None else found.share

    def judge_sentences(self, text: str, meta: dict[str, Any], picture: np.ndarray) -> list[tuple[str, bool | None]]:
        """By the scene in a sample's JSON; without one by what of the text itself leaves no doubt (``read_scene``)."""
        parts = sentences(text)
        try:
            scene, exact = scene_from_meta(meta), [True] * len(parts)
        except UserError:
            told, exact = read_scene(parts, *picture.shape[:2])
            if told is None:
                return [(part, None) for part in parts]
            scene = told
        found = follow(scene, parts, picture)
        return [(part, one.followed if sure and one is not None else None) for part, sure, one in zip(parts, exact, found, strict=True)]

    def alignment(
        self, items: Sequence[HeldOut], pictures: Sequence[np.ndarray], rebuilt: Sequence[np.ndarray],
        others: Sequence[HeldOut], unseen: Sequence[np.ndarray],
    ) -> dict[str, Any]:  # fmt: skip
        """Scores of pictures drawn from paragraphs ("drawn", and "by_objects" for each number of objects), of the true pictures
        ("true") and of the codec's reconstructions of them ("codec"); each a share with its 95 % interval. "sentences" holds
        the share of sentences that were followed, by third of the paragraph, and "unseen" the scores of pictures drawn from
        captions in words that training lacks, where there are any."""
        scenes = _scenes(items)
        scores = _scores(scenes, pictures)
        result: dict[str, Any] = {
            "drawn": _plain(scores),
            "by_objects": {
                str(count): {name: asdict(share) for name, share in shares.items()} for count, shares in by_objects(scores).items()
            },
            "true": _plain(_scores(scenes, [item.image for item in items])),
            "codec": _plain(_scores(scenes, rebuilt)),
            "sentences": sentence_recall([item.paragraph for item in items], scenes, pictures),
            "scenes": len(scenes),
        }
        if others:
            result["unseen"] = _plain(_scores(_scenes(others), unseen))
        return result

    def told(self, alignment: dict[str, Any]) -> tuple[dict[str, float], str]:
        """The shares by name, and the colours and sentences as lines."""
        followed = {part: value["share"] for part, value in alignment["sentences"].items()}
        shares = {key: value["share"] for key, value in alignment["drawn"].items()}
        shares |= {f"unseen_{key}": value["share"] for key, value in alignment.get("unseen", {}).items()}
        for count, found in alignment["by_objects"].items():
            shares[f"colour_at_place_of_{count}"] = found["colour_at_place"]["share"]
        lines = alignment_text(alignment)
        if followed:
            parts = ", ".join(f"{part} {share:.1%}" for part, share in followed.items())
            lines += f"\nsentences followed, by third of the paragraph: {parts}"
        return {**shares, **{f"sentences_{part}": share for part, share in followed.items()}}, lines


def _scenes(items: Sequence[HeldOut]) -> list[Scene]:
    return [scene_from_meta(item.meta) for item in items]


def _scores(scenes: Sequence[Scene], pictures: Sequence[np.ndarray]) -> list[SceneScore]:
    return [score(scene, image) for scene, image in zip(scenes, pictures, strict=True)]


def _plain(scores: Sequence[SceneScore]) -> Shares:
    return {measure: asdict(share) for measure, share in summarise(scores).items()}


def sentence_recall(paragraphs: Sequence[str], scenes: Sequence[Scene], pictures: Sequence[np.ndarray]) -> dict[str, dict[str, float]]:
    """The share of a paragraph's sentences that its picture, uint8 [H, W, 3], follows, with its interval over scenes: in its
    first, middle and last third, and in all ("first", "middle", "last", "all"; a part without any is left out).

    It is the recall of the evaluation's sentence report: a model that forgets the end of long texts shows it here.
    """
    told: list[tuple[str, float, str]] = []
    for number, (paragraph, scene, picture) in enumerate(zip(paragraphs, scenes, pictures, strict=True)):
        parts = sentences(paragraph)
        for place, found in enumerate(follow(scene, parts, picture)):
            if found is not None:
                told.append((third(place, len(parts)).split()[0], float(found.followed), str(number)))
    result = {}
    for part in ("first", "middle", "last", "all"):
        rows = [row for row in told if part in (row[0], "all")]
        if rows:
            share = mean([value for _, value, _ in rows], [name for _, _, name in rows])
            result[part] = {"share": share.mean, "low": share.low, "high": share.high, "n": share.n}
    return result


def stage_table(run_dir: Path) -> str:
    """The stages of a run, one row each, with the unbound score, codec and true pictures below: as Markdown. UserError when no stage of
    the run is complete."""
    summaries = [json.loads(path.read_text()) for path in sorted(run_dir.glob("stage[0-9]/summary.json"))]
    if not summaries:
        raise UserError(f"{run_dir} holds no finished stage; run `python train.py stage=1 run_dir={run_dir}` first.")
    named = {f"stage {summary['stage']}": summary for summary in summaries}
    numbers = {name: _numbers(summary) for name, summary in named.items()}
    return _tables(numbers, {name: summary["alignment"] for name, summary in named.items()})


def alignment_table(name: str, alignment: dict[str, Any]) -> str:
    """One checkpoint's alignment (see Validation.alignment) beside the unbound score, codec and true pictures: as Markdown."""
    return _tables({name: [""] * 4}, {name: alignment})


def alignment_text(alignment: dict[str, Any]) -> str:
    """The alignment's colours (see Validation.alignment) as one line, and one for the captions in unseen words."""
    lines = [f"right colour at the right place: {_colours(alignment['drawn'])}"]
    counts = (f"{count} {found['colour_at_place']['share']:.1%}" for count, found in alignment["by_objects"].items())
    lines[0] += f"; by number of objects: {', '.join(counts)}"
    lines[0] += f"; colour and shape {alignment['drawn']['colour_and_shape']['share']:.1%}"
    lines[0] += f"; true pictures {alignment['true']['colour_at_place']['share']:.1%}"
    if "unseen" in alignment:
        lines.append(f"the same from paragraphs in unseen words: {_colours(alignment['unseen'])}")
    return "\n".join(lines)


def _colours(shares: dict[str, dict[str, float]]) -> str:
    right = shares["colour_at_place"]
    text = f"{_share(right)} of {right['n']} objects, unbound {shares['unbound']['share']:.1%}"
    return f"{text}, binding {_number(shares['binding'])}" if "binding" in shares else text


def _tables(numbers: dict[str, list[str]], alignments: dict[str, dict[str, Any]]) -> str:
    """The table of all measures, and the one of colour-at-place by number of objects."""
    empty = [""] * 4
    rows = []
    for name, alignment in alignments.items():
        rows.append([name, *numbers[name], *_cells(alignment.get("drawn", {}))])
        if "unseen" in alignment:
            rows.append([f"{name}, unseen words", *empty, *_cells(alignment["unseen"])])
    scored = {name: alignment for name, alignment in alignments.items() if alignment}
    if not scored:
        return _markdown([list(HEAD), *rows])
    last = list(scored.values())[-1]
    rows += [
        ["unbound (its colours at random)", *empty, f"{last['drawn']['unbound']['share']:.1%}", "0.00", *empty, ""],
        ["codec's reconstructions", *empty, *_cells(last["codec"])],
        ["true pictures", *empty, *_cells(last["true"])],
    ]
    counts = list(last["by_objects"])
    by_objects = [["colour at place, by objects", *counts]]
    for name, alignment in scored.items():
        found = alignment["by_objects"]
        by_objects.append([name, *(_share(found[count]["colour_at_place"]) for count in counts)])
    by_objects.append(["unbound", *(f"{last['by_objects'][count]['unbound']['share']:.1%}" for count in counts)])
    note = f"{last['scenes']} held-out scenes; in brackets the 95 % interval by bootstrap over scenes."
    return f"{_markdown([list(HEAD), *rows])}\n\n{_markdown(by_objects)}\n\n{note}"


def _markdown(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _numbers(summary: dict[str, Any]) -> list[str]:
    """Steps, time and losses of a stage."""
    losses = summary["validation"]
    shown = (f"{losses[key]:.4f}" if key in losses else "" for key in ("loss_short", "loss_long"))
    return [str(summary["steps"]), f"{summary['seconds'] / 60:.1f} min", *shown]


def _cells(shares: dict[str, dict[str, float]]) -> list[str]:
    return ["" if name not in shares else _number(shares[name]) if name == "binding" else _share(shares[name]) for name in MEASURES]


def _share(value: dict[str, float]) -> str:
    return f"{value['share']:.1%} ({value['low']:.0%}-{value['high']:.0%})"


def _number(value: dict[str, float]) -> str:
    return f"{value['share']:.2f} ({value['low']:.2f} to {value['high']:.2f})"
