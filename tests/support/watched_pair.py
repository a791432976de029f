"""One of two processes that a watch keeps together, in a scenario: NAME FOLDER. "asleep" stands for a wait that nothing ends
from within, as in a collective operation of NCCL."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from paradiffusion import entry
from paradiffusion.errors import UserError
from paradiffusion.training.watch import Watch, together

NAME, FOLDER, RANK = sys.argv[1], Path(sys.argv[2]), int(os.environ["RANK"])
# By name and rank: what it ends with.
ERRORS: dict[tuple[str, int], Exception] = {
    ("all", 0): UserError("the same everywhere"),
    ("all", 1): UserError("the same everywhere"),
    ("bug", 1): KeyError("a bug"),
    ("first", 0): UserError("only the main process"),
    ("other", 1): UserError("only the other one"),
    ("meeting", 1): UserError("while they meet"),
}


def work(watch: Watch) -> None:
    if (NAME, RANK) in ERRORS:
        raise ERRORS[NAME, RANK]
    if (NAME, RANK) == ("killed", 0):
        watch.beat("data", 3, ["000000.tar/bird"])
        time.sleep(5)  # the other looks every two seconds
        os.kill(os.getpid(), signal.SIGKILL)
    if NAME in ("meeting", "killed"):
        dist.barrier()
    watch.beat("backward", 7)
    if (NAME, RANK) == ("late", 1):
        watch.beat("data", 7, ["000000.tar/dog"])
    if (NAME, RANK) == ("stopped", 0):
        time.sleep(0.2)  # sooner after its start a place is posted by the thread alone
        watch.beat("encode", 7, ["000000.tar/cat"])
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGSTOP)
    if NAME == "paused":
        (FOLDER / f"ready{RANK}").touch()
        while not (FOLDER / "resumed").exists():
            time.sleep(0.05)
    if NAME in ("fine", "paused"):
        dist.barrier()
        return
    time.sleep(600)


def main(_: list[str]) -> int:
    with together(watch):
        work(watch)
    return 0


# They meet at a file: a port found free for so many pairs may be taken before it is used.
meeting = f"file://{FOLDER}/{NAME}.store"
dist.init_process_group("gloo", init_method=meeting, rank=RANK, world_size=2, timeout=timedelta(seconds=60))
dist.barrier()
watch = Watch(RANK, 2, 4.0 if NAME in ("late", "paused", "stopped") else 600.0)
watch.on_leave = lambda: print("cleaned up", flush=True)
entry.run(main)
