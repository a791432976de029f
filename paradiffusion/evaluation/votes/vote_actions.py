"""The four actions of scripts/vote.py: serve (which begins a study, or goes on with one), tokens, results, export."""

from __future__ import annotations

import secrets
from pathlib import Path

from paradiffusion.errors import UserError
from paradiffusion.evaluation.suites.suite import Suite
from paradiffusion.evaluation.votes.vote_options import VoteOptions
from paradiffusion.evaluation.votes.vote_store import VOTES, Store
from paradiffusion.evaluation.votes.vote_study import (
    STUDY,
    Study,
    VotedPrompt,
    all_pairs,
    assign,
    read_study,
    spread,
    write_study,
)
from paradiffusion.evaluation.votes.voted_sets import common_prompts, look_at, open_sources

USUAL_REPEATS = 2  # our choice: the least that shows how far raters agree


def open_study(options: VoteOptions, suite: Suite | None = None) -> Study:
    """The study in ``study=``, begun with the other keys where there is none yet.

    Args:
        suite: what ``suite=`` names, loaded; None where the sets' evaluations say it.
    Raises:
        UserError: for keys that differ from those that the study began with, and for what cannot be compared.
    """
    folder = Path(str(options.study)).expanduser()
    if not (folder / STUDY).exists():
        if (folder / VOTES).exists():
            raise UserError(
                f"{folder} holds votes and no {STUDY}; bring that back from a copy, or choose another study=."
            )
        study = make_study(options, folder, suite)
        write_study(study)
        return study
    study = read_study(folder)
    if changed := options.changed(study.settings):
        raise UserError(
            f"the study {folder} began with another {changed[0]}=, and is fixed since; leave {' and '.join(f'{c}=' for c in changed)} "
            "out to go on with it, or choose another study= folder."
        )
    return study


def make_study(options: VoteOptions, folder: Path, suite: Suite | None = None) -> Study:
    """Look at the sets' pictures and decide who sees which pairs. Raises UserError."""
    settings = options.settings()
    # Sides that follow from names and a known seed could be computed by a rater; study.json keeps what was drawn.
    seed = options.seed if "seed" in options.given else secrets.randbelow(1 << 31)
    raters = options.rater_names()
    repeats = options.repeats or min(USUAL_REPEATS, len(raters))
    sources = open_sources(options.set_paths(), suite)
    suite_name, prompts = common_prompts(sources, suite)
    prompts = list(Suite(suite_name, suite_name, tuple(prompts)).first(options.count).prompts)
    pairs = all_pairs([prompt.id for prompt in prompts], [source.name for source in sources], options.images_per_prompt)
    if options.pairs_per_rater is not None:
        pairs = spread(pairs, max(1, options.pairs_per_rater * len(raters) // repeats), seed)
    shown = {pair.prompt for pair in pairs}
    prompts = [prompt for prompt in prompts if prompt.id in shown]
    questions = options.asked()
    rounds = 1 if options.ask == "together" else len(questions)
    study = Study(
        folder=folder,
        title=options.title.strip(),
        suite=suite_name,
        settings=settings,
        ask=options.ask,
        questions=questions,
        prompts={p.id: VotedPrompt(p.id, p.text, p.category, p.band) for p in prompts},
        sets={},
        pairs=pairs,
        tasks=assign(pairs, raters, repeats, rounds, options.retest, seed),
    )
    sets = [look_at(source, prompts, options.images_per_prompt) for source in sources]
    study.sets.update({one.name: one for one in sets})
    check_set_names(study)
    for one in sets:
        if all(picture.error for row in one.pictures.values() for picture in row):
            reason = next(iter(one.pictures.values()))[0].error
            raise UserError(
                f"the set {one.name} has no picture of these prompts that can be shown ({reason}); look at its folder."
            )
    return study


def check_set_names(study: Study) -> None:
    """Raises UserError where a text that raters read names a set, which would tell them whose picture is whose."""
    texts = [study.title, *(part for q in study.questions for part in (q.name, q.text)), *study.tasks]
    for name in study.sets:
        if len(name) > 2 and any(name.lower() in text.lower() for text in texts):
            raise UserError(
                f"the set's name {name} stands in the title, a question or a rater's name, which raters see; reword it."
            )


def run_action(options: VoteOptions, suite: Suite | None = None) -> int:
    """Do what ``options`` name, checked; the exit status. ``suite`` is what ``suite=`` names, loaded.

    Raises:
        UserError: for what cannot be done, and for files that cannot be read or written, such as an ``output=`` that is a
            folder.
    """
    try:
        if options.action == "serve":
            return serve(options, suite)
        study = read_study(Path(str(options.study)).expanduser())
        return {"tokens": tokens, "results": results, "export": export}[str(options.action)](study, options)
    except OSError as error:
        place = error.filename2 or error.filename or options.study
        raise UserError(
            f"{place} cannot be used ({error.strerror or error}); make room for it, or choose another study= or output=."
        ) from None


def serve(options: VoteOptions, suite: Suite | None) -> int:
    """Serve the vote page until Ctrl-C or SIGTERM."""
    from paradiffusion.apps.vote import serve_votes

    study = open_study(options, suite)
    serve_votes(study, options.host, options.port, options.host_names(), about(study))
    return 0


def about(study: Study) -> list[str]:
    """What there is to vote on, in a few lines."""
    shown = [[t for t in tasks if study.settled(study.pairs[t.pair]) is None] for tasks in study.tasks.values()]
    counts = sorted({len(tasks) for tasks in shown})  # as the raters' pages count them
    lines = [
        f"{len(study.prompts)} prompts of {study.suite}, {len(study.sets)} sets, {len(study.pairs)} pairs; "
        f"{' to '.join(map(str, counts[:: max(len(counts) - 1, 1)]))} screens for each of {len(study.tasks)} raters."
    ]
    if failures := study.failures():
        name, prompt, _, why = failures[0]
        lines.append(
            f"missing pictures: {len(failures)}, such as that of {name} for {prompt} ({why}); where only one is there, it wins."
        )
    return lines


def tokens(study: Study, options: VoteOptions) -> int:
    """Print the raters' addresses again."""
    from paradiffusion.apps.vote import addresses

    for line in addresses(study, options.host, options.port):
        print(line)
    return 0


def results(study: Study, options: VoteOptions) -> int:
    """Count what there is; the server may go on meanwhile."""
    from paradiffusion.evaluation.votes.vote_report import summary, write_results
    from paradiffusion.evaluation.votes.vote_results import results_of

    store = Store(study)
    try:
        found = results_of(study, store.votes(), store.comments(), options.seed)
    finally:
        store.close()
    folder = Path(options.output).expanduser() if options.output else study.folder
    page = write_results(found, folder)
    for line in summary(found):
        print(line)
    print(f"See {page}; the same is in {page.with_suffix('.md').name} and {page.with_suffix('.json').name} beside it.")
    return 0


def export(study: Study, options: VoteOptions) -> int:
    """Write every vote as a row of a CSV file."""
    from paradiffusion.evaluation.votes.vote_report import write_csv

    store = Store(study)
    try:
        path = Path(options.output).expanduser() if options.output else study.folder / "votes.csv"
        count = write_csv(study, store.votes(), store.comments(), path)
    finally:
        store.close()
    print(f"{count} votes of {study.folder / VOTES} are in {path}.")
    return 0
