"""Draw the built-in data set: ``python scripts/make_demo_data.py --folder data/demo``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paradiffusion.entry import run
from paradiffusion.scenes.dataset import DEFAULT_SIZES, SETS, WORLDS, ensure_demo_data


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Draw the built-in data set, unless the folder holds it already.")
    made.add_argument("--folder", type=Path, help="default: data/demo or data/demo_large")
    made.add_argument("--world", choices=WORLDS, default="small")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--processes", type=int, default=None, help="default: one per core")
    for name in SETS:
        defaults = " or ".join(str(DEFAULT_SIZES[world][name]) for world in WORLDS)
        made.add_argument(f"--{name}", type=int, metavar="N", help=f"samples (default {defaults}, 0 for none)")
    return made


def main(arguments: list[str]) -> int:
    """Draw what is missing and say where it is."""
    options = parser().parse_args(arguments)
    folder = options.folder or Path("data/demo" if options.world == "small" else "data/demo_large")
    given = {name: getattr(options, name) for name in SETS if getattr(options, name) is not None}
    sizes = {name: size for name, size in (DEFAULT_SIZES[options.world] | given).items() if size != 0}
    folders = ensure_demo_data(folder, sizes, options.seed, options.processes, options.world)
    for name, folder in folders.items():
        print(f"{name}: {sizes[name]} pictures in {folder}")
    return 0


if __name__ == "__main__":
    run(main, lambda: parser().format_help())
