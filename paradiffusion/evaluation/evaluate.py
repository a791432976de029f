"""Evaluation of checkpoints on suites of prompts: pictures, scores, and a report; stoppable and resumable."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from paradiffusion.atomic import write_atomic
from paradiffusion.errors import UserError
from paradiffusion.evaluation.drawing.picture_source import Place, Source
from paradiffusion.evaluation.evaluate_options import EvaluateOptions
from paradiffusion.evaluation.offered_scores import check_possible, make_scores, offers
from paradiffusion.evaluation.records import Drawn, Evaluation, Run, Score, ScoreResult, estimate, write_evaluation
from paradiffusion.evaluation.reporting.evaluation_report import write_report
from paradiffusion.evaluation.reporting.texts import estimate_text
from paradiffusion.evaluation.scores.agreement import HumanPair, agreement, read_pairs
from paradiffusion.evaluation.subjects import Subject, base_folder, bind_folder, joint_folder, made_before, subjects_of, suite_folder
from paradiffusion.evaluation.suites.suite import Suite
from paradiffusion.evaluation.votes.vote_report import read_results
from paradiffusion.evaluation.votes.vote_results import Results
from paradiffusion.machine import choose_device
from paradiffusion.sampling.run import Processes, all_do, disk_errors, first_does, joined_processes, written_alone
from paradiffusion.stopping import Stopped, StopSignal, stop_on_signals


@dataclass
class Task:
    source: Source
    suite: Suite
    folder: Path
    own_folder: bool
    scores: list[Score | ScoreResult]


def evaluate(options: EvaluateOptions, suites: Sequence[Suite]) -> int:
    """Draw, score and report what the options ask for; the exit status.

    Args:
        suites: those of ``suite=``, in order.
    Raises:
        UserError: for wrong input, before any model is loaded where it can be known; for a disk that is full; and, once
            everything else is done, for a score that failed.
    """
    if (ray := options.ray()) is not None:
        from paradiffusion.ray_pool import run_ranks

        local = replace(options, runner="local", runner_options=None)
        try:
            with stop_on_signals() as signal:
                return int(run_ranks(partial(evaluate, local, suites), ray, signal.check))
        except Stopped:
            print("Stopped; the same command goes on from here.", flush=True)
            return signal.status
    # Before the processes meet: what they all find wrong is then said once.
    device = str(choose_device(options.device))
    subjects = subjects_of(options)
    made = [None if subject.made is None else made_before(subject, suites) for subject in subjects]
    suites = list(suites) or _suites_of(made)
    tasks = [[] if subject.source is None else _tasks(options, subject.source, suites, device) for subject in subjects]
    check_possible(options, [task.scores for own in tasks for task in own])
    pairs = read_pairs(Path(options.agreement).expanduser()) if options.agreement else []
    votes = read_results(Path(options.votes).expanduser()) if options.votes else None
    with stop_on_signals() as signal, joined_processes() as processes:
        processes.set_threads(options.threads)
        results: list[Evaluation] = []
        failures: list[str] = []
        try:
            for before, own in zip(made, tasks, strict=True):
                results += [] if before is None else [before]
                for task in own:
                    evaluation, failed = _evaluate(options, task, processes, signal)
                    results.append(evaluation)
                    failures += [f"{evaluation.label} on {task.suite.name}: {sentence}" for sentence in failed]
                for task in own[:1]:
                    task.source.close()
        except Stopped:
            if processes.rank == 0:
                print("Stopped; the same command goes on from here.", flush=True)
            return signal.status
        first_does(processes, lambda: _report(options, subjects, results, suites, pairs, votes))
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise UserError(f"all was written but a score that could not be computed{more}: {failures[0]}")
    return 0


def _suites_of(made: Sequence[Evaluation | None]) -> list[Suite]:
    """The suites of evaluations that were made before, where ``suite=`` names none."""
    suites: dict[str, Suite] = {}
    for one in made:
        if one is None:
            raise UserError("suite= is missing; name one, such as suite=scenes, for what is not evaluated yet.")
        suite = suites.setdefault(one.suite.name, one.suite)
        if suite.fingerprint != one.suite.fingerprint:
            raise UserError(
                f"compare= has evaluations of {suite.name} with {len(suite.prompts)} and with {len(one.suite.prompts)} prompts, "
                "which are not the same ones; compare evaluations of the same prompts."
            )
    return list(suites.values())


def _tasks(options: EvaluateOptions, source: Source, suites: Sequence[Suite], device: str) -> list[Task]:
    tasks = []
    for suite in suites:
        source.images_of(suite)  # a folder of pictures that fits no suite is refused before anything is drawn
        own = options.output_dir is None or options.compare is not None
        folder = base_folder(source) / suite_folder(suite, options.count)
        if not own:
            folder = Path(str(options.output_dir)).expanduser()
            folder = folder / suite_folder(suite, options.count) if len(suites) > 1 else folder
        chosen = make_scores(options, offers(options, suite, source.painter(suite), device, source.kind))
        tasks.append(Task(source, suite, folder, own, chosen))
    return tasks


def _evaluate(options: EvaluateOptions, task: Task, processes: Processes, signal: StopSignal) -> tuple[Evaluation, list[str]]:
    """One model on one suite, its evaluation.json and report written; and what failed."""
    source, suite = task.source, task.suite
    wanted = options.images_per_prompt or source.images_of(suite)
    place = Place(suite, wanted, task.folder, processes, signal)
    if place.first:
        print(f"== {source.label} on {suite.name}: {len(suite.prompts)} prompts, {task.folder}", flush=True)
    refusal = f"another evaluation is writing to {task.folder}; wait for its end."
    with written_alone(task.folder, processes, refusal):
        first_does(processes, lambda: bind_folder(place, source, task.own_folder))
        images, described = source.draw(place)
        if place.first:
            _announce([image.name for image in images if image.error], described, len(images))
        if options.clip or options.vlm or options.inception:
            source.close()  # their models take its place in memory; the counterfactual, which is last, loads it again
        results, failures = score_all(task.scores, images, described, place)
        task.scores = []  # and their models with them
        evaluation = Evaluation(source.label, source.kind, described, suite, wanted, images, results)

        def write() -> None:
            with disk_errors(task.folder):
                write_evaluation(task.folder, evaluation)
                write_report(task.folder, [evaluation])

        first_does(processes, write)
    return evaluation, failures


def _announce(images_failed: list[str], described: dict[str, Any], total: int) -> None:
    strangers = described.get("unmatched") or []
    for names, what in (
        (strangers, f"{len(strangers)} pictures are not used, since they are named after no wanted image"),
        (images_failed, f"{len(images_failed)} of {total} images failed and count as failures"),
    ):
        if names:
            print(f"warning: {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}", flush=True)


def _report(
    options: EvaluateOptions, subjects: Sequence[Subject], results: list[Evaluation], suites: Sequence[Suite],
    pairs: Sequence[HumanPair], votes: Results | None,
) -> None:  # fmt: skip
    """The joint reports of several models or suites, and what a person should read now."""
    bases = [base_folder(s.source) if s.source else Path(str(s.made)).parent for s in subjects]
    names = [s.source.name if s.source else s.label or Path(str(s.made)).resolve().name for s in subjects]
    several = len(subjects) > 1
    joint = joint_folder(bases, names) if several else bases[0]
    joint = Path(options.output_dir).expanduser() if options.output_dir else joint
    if not any(subject.label for subject in subjects):
        results = with_short_labels(results)
    labels = list(dict.fromkeys(one.label for one in results))
    if options.baseline is not None and options.baseline not in labels:
        raise UserError(f"baseline={options.baseline} is none of the models; choose one of {', '.join(labels)}.")
    page, joined = joint / "report.html", list[Evaluation]()
    with disk_errors(joint):
        for suite in suites:
            rows = [one for one in results if one.suite.name == suite.name]
            inside = len(suites) > 1 or not options.output_dir
            folder = joint / suite_folder(suite, options.count) if inside else joint
            if pairs:  # how often each score prefers the picture that people prefer
                rows[0] = replace(rows[0], scores=[*rows[0].scores, agreement(rows, pairs)])
            page = folder / "report.html"
            if several:
                page = write_report(folder, rows, votes=votes, baseline=options.baseline)
            print(show_table(suite, rows), flush=True)
            joined += rows
        if len(suites) > 1:
            page = write_report(joint, joined, votes=votes, baseline=options.baseline)
    print(f"Look at {page}", flush=True)


def with_short_labels(results: list[Evaluation]) -> list[Evaluation]:
    """ "stage 1", "stage 2" where all are stages of one run, since its name says nothing there."""
    split = [one.label.rpartition(" stage ") for one in results]
    runs = {run for run, _, _ in split}
    if len(runs) != 1 or not split[0][0] or len({one.label for one in results}) == 1:
        return results
    return [replace(one, label=f"stage {number}") for one, (_, _, number) in zip(results, split, strict=True)]


def show_table(suite: Suite, evaluations: Sequence[Evaluation]) -> str:
    """One line for each measure, one column for each model, with 95 % intervals; scores that were not computed are named."""
    rows = [["", *(one.label for one in evaluations)]]
    for name in dict.fromkeys(score.name for one in evaluations for score in one.scores):
        results = [one.score(name) for one in evaluations]
        known = [result for result in results if result is not None and not result.skipped]
        rows += [[result.title, *("" for _ in evaluations)] for result in known[:1]]
        for measure in {measure.name: measure for result in known for measure in result.measures}.values():
            values = [None if result is None else estimate(result, measure) for result in results]
            rows.append([f"  {measure.title}", *(estimate_text(value, measure.unit) for value in values)])
    failed = [str(sum(bool(image.error) for image in one.images)) for one in evaluations]
    rows.append(["images that failed", *failed])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    skipped = dict.fromkeys(score.name for one in evaluations for score in one.scores if score.skipped)
    note = f"\nnot computed, the report says why: {', '.join(skipped)}" if skipped else ""
    return f"\n{suite.title} ({len(suite.prompts)} prompts; mean, 95 % interval over prompts)\n" + "\n".join(lines) + note


SETTINGS = "settings.json"
LAST = ("counterfactual",)  # it draws, so that the model that is judged must be in memory beside the judge


def score_all(
    scores: Sequence[Score | ScoreResult], images: list[Drawn], source: dict[str, Any], place: Place
) -> tuple[list[ScoreResult], list[str]]:
    """Each score's result, in order, and a sentence for each that could not be computed, which keeps no other from being computed.

    The results are whole in the first process alone. Raises Stopped after a signal, in every process."""
    results = {score.name: score for score in scores if isinstance(score, ScoreResult)}
    failures = []
    for score in sorted(scores, key=lambda score: score.name in LAST):
        if isinstance(score, ScoreResult):
            continue
        try:
            results[score.name] = _score(score, images, source, place)
        except UserError as error:
            results[score.name] = ScoreResult(score.name, score.title, skipped=str(error))
            failures.append(f"{score.name}: {error}")
    return [results[score.name] for score in scores], failures


def _score(score: Score, images: list[Drawn], source: dict[str, Any], place: Place) -> ScoreResult:
    work, processes = place.folder / "scores" / score.name, place.processes
    run = Run(processes.rank, processes.size, place.signal)

    def bind() -> None:
        """Empty what was found under other settings, or about other pictures."""
        failed = {image.name: image.error for image in images if image.error}
        about = {"fingerprint": place.suite.fingerprint, "failed": failed, "content": source.get("content")}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        text = json.dumps({"settings": score.settings(), "about": digest}, ensure_ascii=False, sort_keys=True)
        kept = work / SETTINGS
        with disk_errors(place.folder):
            if not kept.is_file() or kept.read_text(encoding="utf-8") != text:
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir(parents=True)
                write_atomic(kept, text)

    def prepare() -> None:
        with disk_errors(place.folder):
            score.prepare(place.suite, images[processes.rank :: processes.size], work, run)

    first_does(processes, bind)
    all_do(processes, prepare, tell=True)
    found: list[ScoreResult] = []

    def join() -> None:
        with disk_errors(place.folder):
            found.append(without_nan(score.result(place.suite, images, work)))

    first_does(processes, join)
    return found[0] if found else ScoreResult(score.name, score.title)


def without_nan(result: ScoreResult) -> ScoreResult:
    """An image with a value that is no finite number, as half precision may give, failed: it must not leave the mean."""
    worst = {measure.name: measure.worst for measure in result.measures}
    for one in result.images:
        bad = sorted(name for name, value in one.values.items() if not math.isfinite(value))
        for name in bad:
            least = worst.get(name)
            if least is None:
                del one.values[name]
            else:
                one.values[name] = least
        if bad and not one.error:
            one.error = f"{' and '.join(bad)} came out as no finite number"
    return result
