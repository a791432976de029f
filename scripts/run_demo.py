"""The whole job on the built-in data: three stages, then pictures, then a table of what was learned.

    python scripts/run_demo.py run_dir=runs/nano [any override of train.py]

Each stage is the command that a user types; running this again goes on where it stopped.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from paradiffusion.entry import run  # noqa: E402
from paradiffusion.stopping import stop_on_signals  # noqa: E402


def run_to_its_end(command: list[str]) -> int:
    """The exit status of a command, which saves what it has where a signal asks us to stop, and passes it on."""
    with stop_on_signals() as stop, subprocess.Popen(command) as process:
        while stop.came_at is None and process.poll() is None:
            time.sleep(0.1)
        if stop.came_at is not None:
            process.terminate()  # once: Ctrl-C has reached it by itself, and it may be leaving already
        status = process.wait()
    if stop.came_at is not None and status == 0:  # it was done at that moment; what comes after it is not to begin
        return stop.status
    return status if status >= 0 else 128 - status


def main(arguments: list[str]) -> int:
    """Run the stages, sample.py and the report; the first status that is not 0 ends it."""
    run_dir = next((a.partition("=")[2] for a in arguments if a.startswith("run_dir=")), "runs/nano")
    rest = [argument for argument in arguments if not argument.startswith("run_dir=")]
    began = time.monotonic()
    commands = [["train.py", f"stage={stage}", f"run_dir={run_dir}", *rest] for stage in (1, 2, 3)]
    commands.append(["sample.py", f"ckpt={run_dir}", "prompt_file=data/prompts.txt", f"output_dir={run_dir}/samples"])
    commands.append(["scripts/report_demo.py", run_dir])
    for command in commands:
        print(f"\n$ python {' '.join(command)}", flush=True)
        status = run_to_its_end([sys.executable, str(ROOT / command[0]), *command[1:]])
        if status:
            return status
    print(f"\nall of it took {(time.monotonic() - began) / 60:.1f} minutes; look at {run_dir}/samples/index.html")
    stages = ",".join(f"{run_dir}/stage{stage}" for stage in (1, 2, 3))
    print(f"to see which sentences each stage ignores: python scripts/evaluate.py compare=[{stages}] suite=scenes")
    return 0


if __name__ == "__main__":
    run(main, lambda: __doc__ or "")
