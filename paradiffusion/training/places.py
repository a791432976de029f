"""Where each process of a run is, posted in a small key-value store (torch's TCPStore) that the main process keeps.

It works beside collective operations, which cannot tell who is missing in them. Whoever reads or writes it may wait
without end for a main process that is stopped or whose machine is gone; torch has no time limit there.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta

import torch.distributed as dist

FAILURES, NOTICED = "failures", "noticed"


@dataclass
class Place:
    """Where a process is.

    Attributes:
        at: seconds since the epoch, when it came there.
        alive: when its thread last said so; old where the process has died or its machine is gone.
    """

    rank: int = 0
    host: str = ""
    step: int = 0
    phase: str = "setup"
    keys: list[str] = field(default_factory=list)
    at: float = 0.0
    alive: float = 0.0


class Board:
    """The places of all processes, and two counters: of those that failed, and of those that know.

    Every process makes one at the same time; with one process there is nothing to post.

    Attributes:
        known: each process's place as it was last heard of.
        lost_at: when the main process went, and the board with it; None while it is there.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.ahead = 0.0  # this machine's clock before the main process's, in seconds
        self.lost_at: float | None = None
        self._store = self._open(world_size) if world_size > 1 else None
        now = self.now()
        self.known = {other: Place(other, "unknown machine", at=now, alive=now) for other in range(world_size)}

    def now(self) -> float:
        """Seconds since the epoch by the main process's clock, since those of several machines may differ."""
        return time.time() - self.ahead

    def _open(self, world_size: int) -> dist.TCPStore | None:
        """A store of our own: the process group's is not public, and goes with it."""
        host, patience = os.environ.get("MASTER_ADDR", "localhost"), timedelta(seconds=60)
        store, port = None, 0
        if self.rank == 0:
            store = dist.TCPStore(host, 0, None, True, patience, wait_for_workers=False)
            port = store.port
        dist.barrier()  # so that all of them look at their clocks at the same time
        found: list[tuple[float, int]] = [(0.0, 0)] * world_size
        dist.all_gather_object(found, (time.time(), port))
        self.ahead = found[self.rank][0] - found[0][0]
        return store or dist.TCPStore(host, found[0][1], None, False, patience, wait_for_workers=False)

    @property
    def open(self) -> bool:
        """Whether there is anybody to talk to."""
        return self._store is not None

    def post(self, place: Place) -> None:
        """Say where this process is."""
        try:
            if self._store is not None:
                self._store.set(f"place/{self.rank}", json.dumps(asdict(place)))
        except (RuntimeError, OSError):
            self._lose()

    def read(self, rank: int) -> None:
        """Bring ``known`` up to date about one process."""
        try:
            if self._store is not None and self._store.check([f"place/{rank}"]):
                self.known[rank] = Place(**json.loads(self._store.get(f"place/{rank}")))
        except (RuntimeError, OSError):
            self._lose()

    def count(self, key: str, more: int = 1) -> int:
        """A counter, ``more`` higher; 0 where there is no store."""
        try:
            return int(self._store.add(key, more)) if self._store is not None else 0
        except (RuntimeError, OSError):
            self._lose()
            return 0

    def failed(self) -> bool:
        """Whether any process has said that it ends with an error."""
        try:
            return self._store is not None and bool(self._store.check([FAILURES]))
        except (RuntimeError, OSError):
            self._lose()
            return False

    def _lose(self) -> None:
        self._store, self.lost_at = None, self.lost_at or self.now()
