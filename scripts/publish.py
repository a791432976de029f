"""Copy a checkpoint without its training state, to give away or to sample from elsewhere.

    python scripts/publish.py --ckpt runs/nano --output data/nano [--dtype bfloat16] [--resolution 64]

Weights are the EMA weights; text encoder and codec are recorded by name and hash, not copied.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paradiffusion.entry import run


def main(arguments: list[str]) -> int:
    """Write the published checkpoint and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="a run, a stage or a checkpoint")
    parser.add_argument("--output", required=True, type=Path, help="a folder that does not exist yet")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--resolution", type=int, help="pixels at which it draws by default, of several that it was trained at"
    )
    options = parser.parse_args(arguments)
    from paradiffusion.checkpoints.export import export_ours
    from paradiffusion.checkpoints.layouts import find_checkpoint

    checkpoint = find_checkpoint(options.ckpt)
    if options.resolution is not None:
        checkpoint.description["resolution"] = options.resolution
    export_ours(checkpoint, options.output, options.dtype, frozen="none")
    size = sum(path.stat().st_size for path in options.output.rglob("*") if path.is_file())
    print(f"{options.output}: {size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    run(main, lambda: __doc__ or "")
