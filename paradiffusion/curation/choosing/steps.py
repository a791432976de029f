"""The four steps of scripts/select.py: score, choose, review, export. Models are imported only by who needs them."""

from __future__ import annotations

import getpass
import signal
import threading
from pathlib import Path

from paradiffusion.apps.local_server import address_of
from paradiffusion.curation.choosing.choosing_options import SelectOptions, names, numbers, parts
from paradiffusion.curation.choosing.shard_root import move_root
from paradiffusion.errors import UserError


def run_step(options: SelectOptions) -> int:
    """Do the step that ``options`` name, checked; the exit status."""
    work = Path(str(options.folder)).expanduser()
    if options.shard_root is not None:
        from paradiffusion.curation.choosing.score_files import scored_names

        move_root(work, options.shard_root, scored_names(work))
    return {"score": score, "choose": choose, "review": review, "export": export}[str(options.action)](options, work)


def score(options: SelectOptions, work: Path) -> int:
    """Score the shards."""
    import torch

    from paradiffusion.curation.choosing.scores import Scoring, score_shards
    from paradiffusion.data.shards import expand_shards

    device = options.device
    if device not in ("auto", "cpu", "cuda") and not (device.startswith("cuda:") and device[5:].isdigit()):
        raise UserError(f"device={device} is unknown; choose auto, cpu, cuda or cuda:<number>.")
    if device.startswith("cuda") and int(device[5:] or 0) >= torch.cuda.device_count():
        raise UserError(f"device={device} is not there: torch sees {torch.cuda.device_count()} GPUs; use device=auto.")
    scoring = Scoring(
        clip=options.clip,
        aesthetic=Path(options.aesthetic).expanduser() if options.aesthetic else None,
        detector=options.text_detector,
        labels=tuple(names("text_labels", options.text_labels)),
        threshold=options.text_threshold,
        caption=options.caption,
        precision=options.precision,
        device=device,
        batch_size=options.batch_size,
        threads=options.threads,
        allow_truncated=options.allow_truncated,
    )
    shards = expand_shards(parts(str(options.shards)), "shards")
    count = score_shards(shards, work, scoring, options.processes)
    print(f"{count} samples scored now, {len(shards)} shards in all; next: action=choose folder={work}")
    return 0


def choose(options: SelectOptions, work: Path) -> int:
    """Choose candidates."""
    from paradiffusion.curation.choosing.selection import Choosing
    from paradiffusion.curation.choosing.selection import choose as choose_candidates

    report = choose_candidates(
        work,
        Choosing(
            minimum=numbers("min", options.min),
            maximum=numbers("max", options.max),
            weights=numbers("weights", options.weights),
            count=options.count,
            clusters=options.clusters,
            per_cluster=options.per_cluster,
            max_similarity=options.max_similarity,
            seed=options.seed,
        ),
    )
    for line in report.lines():
        print(line)
    print(f"next: action=review folder={work}")
    return 0


def review(options: SelectOptions, work: Path) -> int:
    """Serve the review page until Ctrl-C or SIGTERM."""
    from paradiffusion.curation.choosing.review import make_server, open_review

    opened = open_review(work, options.reviewer or _account())
    server = make_server(opened, options.host, options.port)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = address_of(options.host, server.server_port)
    print(f"{len(opened.candidates.all)} candidates; open {address}?token={opened.token}", flush=True)
    if options.host not in ("127.0.0.1", "localhost", "::1"):
        print("other machines reach this page, unencrypted: whoever reads the address can decide too.", flush=True)
    stop.wait()
    server.shutdown()
    server.server_close()
    opened.log.close()
    print(
        f"ended; every decision is in {work / 'decisions.jsonl'}. The same command goes on, action=export writes the shards."
    )
    return 0


def export(options: SelectOptions, work: Path) -> int:
    """Write the kept candidates."""
    from paradiffusion.curation.choosing.kept import export as export_kept

    report = export_kept(work, Path(str(options.output)).expanduser(), options.samples_per_shard, options.votes)
    for line in report.lines():
        print(line)
    print(f"train on it with data.shards={options.output} and stage=3")
    return 0


def _account() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no such account within a container
        return "reviewer"
