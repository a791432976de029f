"""Several sampling processes under one launcher, and signals that ask them to stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

from paradiffusion.errors import UserError
from paradiffusion.machine import cores

REPEAT_SECONDS = 2.0  # launchers pass Ctrl-C on to processes that the terminal has told already


class Stopped(Exception):
    """A signal asked the process to stop."""


@dataclass
class StopSignal:
    """Whether SIGINT or SIGTERM came."""

    came_at: float | None = None

    def check(self) -> None:
        """Raise Stopped once a signal has come."""
        if self.came_at is not None:
            raise Stopped

    def handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.came_at is not None and number == signal.SIGINT and now - self.came_at > REPEAT_SECONDS:
            raise KeyboardInterrupt
        self.came_at = self.came_at or now


@contextmanager
def stop_on_signals() -> Iterator[StopSignal]:
    """Note SIGINT and SIGTERM instead of dying of them; a second Ctrl-C after two seconds does kill."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield stop
        return
    before = {number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun or accelerate started; alone by default."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def count() -> int:
        """How many processes the launcher started."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    def agree(self, status: int) -> int:
        """Wait for all processes and return the largest of their statuses."""
        if self.size == 1:
            return status
        largest = torch.tensor([status])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest.item())

    def tell(self, error: UserError | OSError) -> None:
        """Print what stopped this process, where there are others: they may work for hours, and once the first has left
        the launcher ends the rest before they have spoken."""
        if self.size > 1:
            print(f"error: process {self.rank}: {error}", file=sys.stderr, flush=True)
            if isinstance(error, UserError):
                error.told = True

    def device(self) -> str | None:
        """The accelerator of this process, or None where there is nothing to divide."""
        if self.size == 1 or not torch.cuda.is_available():
            return None
        local = int(os.environ.get("LOCAL_RANK", self.rank))
        return f"cuda:{local % torch.cuda.device_count()}"

    def set_threads(self, threads: int | None) -> None:
        """CPU threads: as asked, else all cores shared by the machine's processes, where a launcher set only one."""
        launched = "LOCAL_WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
        if threads is None and launched:
            threads = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        if threads is not None:
            torch.set_num_threads(threads)


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Meet the other processes of the launcher, if any.

    Raises:
        UserError: where RANK and WORLD_SIZE are set, but not what torch needs to find the others.
    """
    size = Processes.count()
    if size == 1:
        yield Processes()
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE={size} asks for several processes, but {', '.join(missing)} is not set; start them with torchrun "
            "or accelerate launch, or unset WORLD_SIZE."
        )
    # The only meeting is at the end, and the slowest process may be hours behind.
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
