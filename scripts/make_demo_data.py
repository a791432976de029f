"""Draw the built-in data set: ``python scripts/make_demo_data.py --folder data/demo``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paradiffusion.errors import UserError
from paradiffusion.scenes.dataset import DEFAULT_SIZES, SETS, WORLDS, ensure_demo_data


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the built-in data set, unless the folder holds it already.")
    parser.add_argument("--folder", type=Path, help="default: data/demo or data/demo_large")
    parser.add_argument("--world", choices=WORLDS, default="small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=None, help="default: one per core")
    for name in SETS:
        defaults = " or ".join(str(DEFAULT_SIZES[world][name]) for world in WORLDS)
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"samples (default {defaults}, 0 for none)")
    options = parser.parse_args()
    folder = options.folder or Path("data/demo" if options.world == "small" else "data/demo_large")
    given = {name: getattr(options, name) for name in SETS if getattr(options, name) is not None}
    sizes = {name: size for name, size in (DEFAULT_SIZES[options.world] | given).items() if size != 0}
    try:
        folders = ensure_demo_data(folder, sizes, options.seed, options.processes, options.world)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, folder in folders.items():
        print(f"{name}: {sizes[name]} pictures in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
