"""The summary that scripts/index_shards.py prints of the indexes it has made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from paradiffusion.data.index import COUNTS, SampleIndex
from paradiffusion.data.shards import ShardPath
from paradiffusion.errors import UserError


def describe_indexes(indexes: Iterable[SampleIndex | UserError]) -> tuple[list[str], int]:
    """What indexing many shards has found, as lines for a person, and how many could not be indexed."""
    errors, cut_short = [], []
    counts, captions, words, tokens = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    shards = samples = uncaptioned = 0
    for index in indexes:
        if isinstance(index, UserError):
            errors.append(f"  not indexed: {index}")
            continue
        shards += 1
        samples += len(index)
        uncaptioned += int((~index.words.any(axis=1)).sum())
        cut_short += [f"  cut short: {path} (data.allow_truncated=true uses its whole samples)" for path in index.truncated]
        counts.update({said: getattr(index, name) for name, said in COUNTS.items()})
        counts["images of unknown size"] += int((index.width == 0).sum())
        for column, kind in enumerate(index.kinds):
            captions[kind] += int((index.words[:, column] > 0).sum())
            words[kind] += int(index.words[:, column].sum())
            tokens[kind] += 0 if index.tokens is None else int(index.tokens[:, column].sum())
    lines = [f"{shards} shards, {samples} samples, {uncaptioned} of them without a caption"]
    for kind, count in captions.items():
        mean = f"{words[kind] / max(count, 1):.1f} words"
        mean += f", {tokens[kind] / max(count, 1):.1f} tokens" if tokens[kind] else ""
        lines.append(f"  captions of kind {kind}: {count}, {mean} on average")
    lines += [f"  passed over: {count} {reason}" for reason, count in counts.items() if count]
    return lines + cut_short + errors, len(errors)


def check_names(shards: Iterable[ShardPath]) -> None:
    """Raise UserError where two shards would have one index in ``output``."""
    stems: dict[str, ShardPath] = {}
    for shard in shards:
        if stems.setdefault(shard.stem, shard) != shard:
            raise UserError(
                f"{stems[shard.stem]} and {shard} have one name, and so would their indexes in output=; "
                "index them in two runs, each with a folder of its own."
            )
