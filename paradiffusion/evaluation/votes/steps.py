"""The four actions of scripts/vote.py: serve, tokens, results, export."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from urllib.parse import quote

from paradiffusion.apps.local_server import address_of
from paradiffusion.errors import UserError
from paradiffusion.evaluation.suites.suite import Suite
from paradiffusion.evaluation.votes.begin import open_study
from paradiffusion.evaluation.votes.options import VoteOptions
from paradiffusion.evaluation.votes.server import Voting, make_server, open_keys
from paradiffusion.evaluation.votes.store import VOTES, Store
from paradiffusion.evaluation.votes.study import Study, read_study

LOCAL = ("127.0.0.1", "localhost", "::1")


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
    study = open_study(options, suite)
    keys, store = open_keys(study), Store(study)
    server = make_server(Voting(study, store, keys), options.host, options.port, options.host_names())
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for line in (*about(study), *addresses(study, options.host, server.server_port)):
        print(line, flush=True)
    if options.host not in LOCAL:
        print("other machines reach this page, unencrypted: who reads an address can vote as that rater.", flush=True)
    stop.wait()
    server.shutdown()
    server.server_close()
    store.close()
    print(f"ended; every vote is in {store.path}. action=serve study={study.folder} goes on, action=results counts.")
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


def addresses(study: Study, host: str, port: int) -> list[str]:
    """One address for each rater, to be sent to that rater alone."""
    keys = open_keys(study)
    return [f"{rater}: {address_of(host, port)}?token={quote(keys.tokens[rater])}" for rater in study.tasks]


def tokens(study: Study, options: VoteOptions) -> int:
    """Print the raters' addresses again."""
    for line in addresses(study, options.host, options.port):
        print(line)
    return 0


def results(study: Study, options: VoteOptions) -> int:
    """Count what there is; the server may go on meanwhile."""
    from paradiffusion.evaluation.votes.report import summary, write_results
    from paradiffusion.evaluation.votes.results import results_of

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
    from paradiffusion.evaluation.votes.export import write_csv

    store = Store(study)
    try:
        path = Path(options.output).expanduser() if options.output else study.folder / "votes.csv"
        count = write_csv(study, store.votes(), store.comments(), path)
    finally:
        store.close()
    print(f"{count} votes of {study.folder / VOTES} are in {path}.")
    return 0
