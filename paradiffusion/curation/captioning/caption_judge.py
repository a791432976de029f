"""Claims of captions, checked by a second model: does the picture show what this sentence says?"""

from __future__ import annotations

import math
import re
from typing import Any, Final

from paradiffusion.curation.captioning.caption import Task, Work, ask, check_journal
from paradiffusion.curation.captioning.caption_journal import Journal, read_lines, write_lines
from paradiffusion.metrics.sentences import sentences
from paradiffusion.metrics.vlm import Decoding, Engine
from paradiffusion.randomness import seed_from, uniform

DECODING: Final = Decoding(max_new_tokens=16)
PROMPT: Final = (
    'Look at the picture and judge this statement about it: "{claim}" Is every part of it visibly true? Answer with one word, '
    "yes or no."
)
_YES, _NO = re.compile(r"^\W*(?:yes|true|correct)\b", re.I), re.compile(r"^\W*(?:no|not|false|incorrect)\b", re.I)


def judge_shard(work: Work, engine: Engine, number: int) -> None:
    """Check a sample of the captions of one shard, sentence by sentence: ``<shard>.judged.jsonl``.

    A caption is among those checked by a draw from its identity, so that the choice does not depend on the run.
    """
    shard, rows = work.index.shards[number], work.rows(number)
    target, path = work.output / f"{shard.stem}.judged.jsonl", work.output / f"{shard.stem}.judging"
    if not target.exists():
        chosen, tasks = _claims(work, number)
        work.bar.total = (work.bar.total or 0) + len(tasks)
        with Journal(path) as journal:
            if not target.exists():  # else another process has written it between our look and its lock
                check_journal(work, journal, rows)
                ask(work, engine, journal, tasks, rows.start)
                write_lines(target, _judged(engine, journal, chosen, rows.start))
    path.unlink(missing_ok=True)


def _claims(work: Work, number: int) -> tuple[list[tuple[int, str, str]], list[Task]]:
    """(row, template, claim) of the sentences to check, and the questions about them."""
    shard, rows = work.index.shards[number], work.rows(number)
    chosen: list[tuple[int, str, str]] = []
    tasks = []
    for row, record in zip(rows, read_lines(work.output / f"{shard.stem}.jsonl"), strict=True):
        identity = int(work.index.ids[row])
        if record["caption"] is None or uniform("judge", work.options.seed, identity) >= work.options.judge_share:
            continue
        for claim in sentences(record["caption"]):
            seed = seed_from("judge", work.options.seed, identity, len(chosen))
            tasks.append(Task(row, len(chosen), PROMPT.replace("{claim}", claim.replace('"', "'")), seed, 0.0))
            chosen.append((row, record["template"], claim))
    return chosen, tasks


def _judged(engine: Engine, journal: Journal, chosen: list[tuple[int, str, str]], first: int) -> list[dict[str, Any]]:
    """The second model's word on each claim, for ``<shard>.judged.jsonl``."""
    records: list[dict[str, Any]] = []
    for part, (row, template, claim) in enumerate(chosen):
        entry = journal.entries[row - first, part]
        verdict = "yes" if _YES.match(entry.text) else "no" if _NO.match(entry.text) else "unclear"
        records.append(
            {"key": entry.key, "template": template, "claim": claim, "verdict": verdict, "answer": entry.text,
             "judge": engine.model, "revision": engine.revision, "seconds": entry.seconds}
        )  # fmt: skip
    return records


def interval(clusters: list[tuple[int, int]]) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, from (confirmed, claims) of each caption.

    Claims about one picture stand or fall together, so their number is divided by the design effect (at least 1): the
    variance of the share between captions over that of as many independent claims.

    Raises ValueError where there is no claim.
    """
    total = sum(claims for _, claims in clusters)
    share = sum(confirmed for confirmed, _ in clusters) / total if total else math.nan
    if not total:
        raise ValueError("no claims")
    effect = 1.0
    if len(clusters) > 1 and 0 < share < 1:
        spread = sum((confirmed - share * claims) ** 2 for confirmed, claims in clusters) / total**2
        spread *= len(clusters) / (len(clusters) - 1)
        effect = max(1.0, spread / (share * (1 - share) / (total - 1)))
    n, z = total / effect, 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
