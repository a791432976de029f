"""Print a run's table: per stage, steps, time, held-out loss on short and long captions, and alignment with the scenes.

    python scripts/report_demo.py [runs/nano]

Read from each stage's summary.json. Alignment is measured on pictures drawn for held-out scenes from their paragraphs,
beside the unbound score (the scenes' own colours at random among their own places), the true pictures, and the codec's
reconstructions. Binding is 0 at the unbound score and 1 where all colours are in their place.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paradiffusion.entry import run
from paradiffusion.scenes.alignment import stage_table


def main(arguments: list[str]) -> int:
    """Print the table of one run."""
    print(stage_table(Path(arguments[0] if arguments else "runs/nano")))
    return 0


if __name__ == "__main__":
    run(main, lambda: __doc__ or "")
