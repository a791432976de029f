"""scripts/benchmark_loader.py: ways of reading take turns in processes of their own, and leave nothing behind."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from paradiffusion.budget.bench_loader import LoaderBench, measure, padding, run_way
from paradiffusion.budget.bench_readers import ReaderSettings
from paradiffusion.budget.synthetic import write_samples
from paradiffusion.errors import UserError

SMALL = LoaderBench(samples=96, width=64, height=48, resolution=32, batch_size=8, workers=1, batches=3, repeats=2)


def reading(folder: Path) -> list[psutil.Process]:
    """The processes that read from ``folder``."""
    return [one for one in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(one.info["cmdline"] or [])]


def test_a_way_of_reading_ends_with_its_workers(tmp_path: Path) -> None:
    write_samples(tmp_path, SMALL.samples, SMALL.width, SMALL.height, ["long"])
    answer = run_way(
        "webdataset", sys.executable, ReaderSettings(str(tmp_path), 32, 8, workers=1, batches=2, work=0.01)
    )
    assert len(answer["keys"]) == 2 and 0 <= answer["waited"] < answer["seconds"] - 0.02
    assert not reading(tmp_path)


def test_a_way_that_cannot_begin_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the webdataset reader in .* ended before it had read"):
        run_way("webdataset", sys.executable, ReaderSettings(str(tmp_path / "nothing"), 32, 8, 1))
    assert not reading(tmp_path)


def test_rows_of_both_ways(tmp_path: Path) -> None:
    rows = measure(SMALL, tmp_path, 0.01, lambda texts: [len(text.split()) for text in texts])
    assert [row.name for row in rows] == ["ours", "webdataset"]
    for row in rows:
        assert len(row.rates) == 2 and min(row.rates) > 0 and 0 <= row.waiting <= 1
    assert rows[0].padded[1] < rows[1].padded[1], "ours sorts captions by length"
    assert not reading(tmp_path)


def test_padding_is_the_share_of_computed_tokens() -> None:
    assert padding([[4, 8], [8, 8]], 1) == pytest.approx(4 / 32)
    assert padding([[4, 9]], 8) == pytest.approx(1 - 13 / 32)
