"""Ray: a pool of workers that take task after task, whose tasks go to others where a worker or its node dies; and workers that are
the ranks of one job.

What is finished the tasks know themselves, by files that all nodes see. Imported only where ``runner=ray`` asks for it.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Final

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError, RpcError, WorkerCrashedError

from paradiffusion.errors import Busy, UserError, reason_of
from paradiffusion.machine import cores
from paradiffusion.repository import PACKAGE
from paradiffusion.runner import EndedFromOutside, Progress, RayOptions, Work

_LOST: Final = (RayActorError, ObjectLostError, WorkerCrashedError)
_DEATHS: Final = 4  # of workers at one task; more, and the task is what kills them
_OBJECT_STORE: Final = 256 << 20  # bytes; only names and counts go through it
_BATCH: Final = 16  # tasks that a worker gets at most in one call, which costs the driver 1.5 ms
_SHOWN: Final = 1.0  # seconds between looks at signals, moves of the bar and questions to a worker how far it is
_BUSY: Final = 120.0  # seconds that a task waits for a worker of before, which a dead node or driver may leave for a while
_WAITING: Final = 30.0  # seconds without any worker before that is told


class Worker:
    """One process: ``function`` is kept, and with it the model that it loads at its first task."""

    def __init__(self, function: Work | None, folder: str) -> None:
        with suppress(OSError):  # relative paths are the driver's, where its folder is to be seen here
            os.chdir(folder)
        warnings.filterwarnings("ignore", category=FutureWarning)  # as the driver's entry point does
        self.function, self.first, self.told = function, -1, Counter[str]()

    def work(self, first: int, tasks: list[Any]) -> tuple[list[Any], dict[str, int]]:
        """What the tasks from number ``first`` on give, of as many as are begun within a second, and all that they told."""
        self.first, self.told = first, Counter()
        results: list[Any] = []
        until = time.monotonic() + _SHOWN
        while len(results) < len(tasks) and (not results or time.monotonic() < until):
            results.append(self.do(tasks[len(results)]))
        return results, dict(self.told)

    def do(self, task: Any) -> Any:
        assert self.function is not None
        until, told = time.monotonic() + _BUSY, self.told.copy()
        while True:
            try:
                return self.function(task, self.tell)
            except Busy:
                if time.monotonic() > until:
                    raise
                self.told = told.copy()
                time.sleep(1.0)

    def tell(self, done: int = 0, /, found: int = 0, more: int = 0, **kinds: int) -> None:
        self.told.update({"done": done, "found": found, "more": more, **kinds})

    @ray.method(concurrency_group="asked")
    def progress(self) -> tuple[int, dict[str, int], str]:
        """The first task of those that are being done, what they have told so far, and the node that this is."""
        return self.first, dict(self.told), ray.get_runtime_context().get_node_id()

    def meeting_point(self) -> tuple[str, int]:
        """Where ranks can meet: this node's address, and a port that is free there."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def join(self, function: Callable[[], Any], rank: int, size: int, point: tuple[str, int]) -> Any:
        """``function()`` as one of the ``size`` processes of a job."""
        place = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": size, "MASTER_ADDR": point[0], "MASTER_PORT": point[1]}
        os.environ.update({name: str(value) for name, value in place.items()})
        return function()


@dataclass
class Hand:
    """A worker as the driver sees it: numbers of the tasks that it has, what they have told, the node that it is on, and whether it owes
    an answer (``asked``), as a new one does: it gets no task until then."""

    actor: Any
    node: str = ""
    tasks: list[int] = field(default_factory=list)
    told: dict[str, int] = field(default_factory=dict)
    asked: bool = False


def connect(options: RayOptions, prints: bool = False) -> None:
    """Join the cluster that ``options`` or RAY_ADDRESS name, or the one of this machine; else start Ray here, on the cores that this
    process may use; what workers print is shown where it ``prints``. UserError where nobody answers."""
    if ray.is_initialized():
        return
    # The workers import what the driver does: the folder of its script is theirs anyway, the repository's is not.
    shared: Any = {
        "runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), *_paths()])}},
        "logging_level": "warning",
        "log_to_driver": prints,
    }
    address = options.address or os.environ.get("RAY_ADDRESS") or "auto"
    named, handler = address not in ("auto", "local"), signal.getsignal(signal.SIGTERM)
    try:
        if named:  # Ray itself would try for minutes
            host, _, port = address.rpartition("/")[2].rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, **shared)
    except (OSError, ValueError, RpcError) as error:
        if named:
            raise UserError(
                f"no Ray cluster answers at {address} ({reason_of(error)[:200].rstrip('.')}); start one with `ray start`, and set "
                "RAY_AUTH_MODE=token where it asks for a token."
            ) from None
        room = max(cores(), ceil((options.workers or 1) * options.cpus))
        ray.init("local", num_cpus=room, object_store_memory=_OBJECT_STORE, include_dashboard=False, **shared)
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's own would end us at once


def _paths() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def needs(options: RayOptions) -> dict[str, float]:
    """What one worker asks Ray for."""
    gpus = options.gpus if options.gpus is not None else float(ray.cluster_resources().get("GPU", 0) >= 1)
    return {"num_cpus": options.cpus, "num_gpus": gpus}


def hire(function: Any, options: RayOptions) -> Any:
    """A new worker; ``function`` may be a reference to it."""
    asked = {"concurrency_groups": {"asked": 1}, "scheduling_strategy": "SPREAD", **needs(options)}
    return ray.remote(**asked)(Worker).remote(function, os.getcwd())


def workers(options: RayOptions, tasks: int) -> int:
    """How many workers do so many tasks: as asked for, else as many as the cluster has room for now."""
    connect(options)
    has, asked = ray.cluster_resources(), needs(options)
    fits = min(has.get(name, 0.0) // asked[key] for name, key in (("CPU", "num_cpus"), ("GPU", "num_gpus")) if asked[key])
    return max(1, min(tasks, options.workers or int(fits)))


def run_on_ray(function: Work, tasks: Sequence[Any], progress: Progress, options: RayOptions) -> list[Any]:
    """``function(task, tell)`` of each task, in their order. Raises what a task raises, what ``progress`` raises, and EndedFromOutside for
    a task at which one worker after the other died."""
    if not tasks:
        return []
    pool = Pool(function, tasks, progress, options)
    try:
        return pool.run()
    finally:
        _end(hand.actor for hand in pool.hands)


def _end(actors: Iterable[Any]) -> None:
    for actor in actors:
        with suppress(Exception):  # it has ended, or the cluster has
            ray.kill(actor)


class Pool:
    """The workers of one list of tasks. The driver holds few tasks in flight, and of each only its number."""

    def __init__(self, function: Work, tasks: Sequence[Any], progress: Progress, options: RayOptions) -> None:
        count = workers(options, len(tasks))
        self.tasks, self.show = tasks, progress
        self.stage, self.options = ray.put(function), options
        self.queue = deque(range(len(tasks)))
        self.results: list[Any] = [None] * len(tasks)
        self.finished, self.shown = Counter[str](), Counter[str]()  # what finished tasks told, and what the bar has
        self.done = 0
        self.deaths = Counter[int | None]()
        self.refs: dict[Any, tuple[Hand, bool]] = {}  # calls under way, and whether they work or only ask
        self.hands = [self.hire() for _ in range(count)]

    def run(self) -> list[Any]:
        began = shown = time.monotonic()
        waits = True
        while self.done < len(self.tasks):
            self.deal()
            ray.wait(list(self.refs), timeout=_SHOWN)
            for ref in ray.wait(list(self.refs), num_returns=len(self.refs), timeout=0)[0]:
                if ref in self.refs:  # else its worker was lost just now
                    self.take(ref)
            now = time.monotonic()
            if now - shown >= _SHOWN:
                shown = now
                self.move()
            waits = waits and all(hand.asked for hand in self.hands)
            if waits and now - began > _WAITING:
                waits = False
                self.say(f"Ray has placed no worker yet; each asks for {needs(self.options)}, and `ray status` says what there is.")
        self.move()
        return self.results

    def hire(self) -> Hand:
        hand = Hand(hire(self.stage, self.options))
        self.ask(hand)
        return hand

    def ask(self, hand: Hand) -> None:
        hand.asked = True
        self.refs[hand.actor.progress.remote()] = hand, False

    def deal(self) -> None:
        """Tasks to each worker that has none: several, lest one that is quick waits for the driver, but few where few are left."""
        for hand in self.hands:
            if not (hand.asked or hand.tasks) and self.queue:
                size = min(_BATCH, max(1, len(self.queue) // (2 * len(self.hands))))
                hand.tasks = [self.queue.popleft() for _ in range(size)]
                self.refs[hand.actor.work.remote(hand.tasks[0], [self.tasks[number] for number in hand.tasks])] = hand, True

    def take(self, ref: Any) -> None:
        """What a call has come to."""
        hand, works = self.refs.pop(ref)
        try:
            found, told, *node = ray.get(ref)
        except _LOST as error:
            return self.replace(hand, error)
        except RayTaskError as error:
            raise cause_of(error) from None
        if works:
            for number, result in zip(hand.tasks, found, strict=False):
                self.results[number] = result
            self.done += len(found)
            self.finished.update(told)
            del self.deaths[None]
            self.queue.extendleft(reversed(hand.tasks[len(found) :]))
            hand.tasks, hand.told = [], {}
        else:
            hand.asked, hand.node = False, node[0]
            if hand.tasks[:1] == [found]:
                hand.told = told
        return None

    def replace(self, hand: Hand, error: Exception) -> None:
        """Another worker for one that is gone; its tasks are the next."""
        self.refs = {ref: called for ref, called in self.refs.items() if called[0] is not hand}
        self.queue.extendleft(reversed(hand.tasks))
        first = hand.tasks[0] if hand.tasks else None
        self.deaths[first] += 1
        reason = _reason(error)
        if getattr(error, "actor_init_failed", False):
            raise UserError(
                f"Ray's workers cannot start ({reason_of(Exception(str(error).splitlines()[-1]))}); each machine needs this repository at "
                "the same place, or gets it by `ray job submit --working-dir .`."
            )
        if self.deaths[first] > _DEATHS * (1 if hand.tasks else len(self.hands)):
            raise EndedFromOutside(
                f"{self.deaths[first]} Ray workers died one after the other, most often for want of memory ({reason}); run the same "
                "command with a smaller batch_size= or other runner_options=: it goes on where it stopped."
            )
        self.say(f"a worker was lost ({reason}); its work goes to another.")
        _end([hand.actor])  # it may only be out of reach, and would go on at what others now do
        self.hands[self.hands.index(hand)] = self.hire()
        for idle in self.hands:  # the node may have taken them too, and a task that they then got would seem to kill them
            if not (idle.asked or idle.tasks):
                self.ask(idle)

    def move(self) -> None:
        """Move the bar, ask the workers how far they are, and replace those of dead nodes, of whose end Ray does not always tell: calls to
        one that SIGSTOP had frozen before were seen to stay open."""
        dead = {node["NodeID"] for node in ray.nodes() if not node["Alive"]}
        for hand in [hand for hand in self.hands if hand.node in dead]:
            self.replace(hand, RayActorError(error_msg="its node is dead"))
        told = Counter(self.finished)
        for hand in self.hands:
            told.update(hand.told)
            if hand.tasks and not hand.asked:
                self.ask(hand)
        changes = {name: told[name] - self.shown[name] for name in {**told, **self.shown}}
        self.shown = told
        self.show(changes.pop("done", 0), **changes)

    def say(self, line: str) -> None:
        self.show.bar.write(f"warning: {line}", file=sys.stderr)


def cause_of(error: RayTaskError) -> BaseException:
    """What a person should read of an error in a worker: ours and the system's by themselves, others with the worker's traceback."""
    cause = error.cause
    return cause if isinstance(cause, UserError | OSError | ModuleNotFoundError) else error


def run_ranks(function: Callable[[], Any], options: RayOptions, check: Callable[[], None]) -> Any:
    """``function()`` in workers that are the ranks of one job, as torchrun would start them; what rank 0 returns. Where one dies all begin
    again, for ``function`` goes on from its files. Raises what ``function`` raises, and what ``check``, called often, raises."""
    connect(options, prints=True)
    size = workers(options, sys.maxsize)
    for _ in range(_DEATHS + 1):
        hired = [hire(None, options) for _ in range(size)]
        calls: list[Any] = []
        try:
            (point,) = _answers([hired[0].meeting_point.remote()], check)
            calls = [actor.join.remote(function, rank, size, point) for rank, actor in enumerate(hired)]
            return _answers(calls, check)[0]
        except _LOST as error:
            lost: Exception = error
        except RayTaskError as error:
            if isinstance(error.cause, UserError) or not (found := _death(calls)):
                raise cause_of(error) from None
            lost = found
        finally:
            _end(hired)
        print(f"warning: a worker was lost ({_reason(lost)}); all begin again.", file=sys.stderr, flush=True)
    raise EndedFromOutside(f"{_DEATHS + 1} times a Ray worker died; see Ray's logs, then run the same command again: it goes on.")


def _reason(error: Exception) -> str:
    """What Ray says of a worker's end, without the numbers before it."""
    text = " ".join(str(error).split())
    found = re.search(r"The actor (?:is dead|died) because.*", text)
    return (found[0] if found else text).partition(" Some common causes")[0][:240]


def _answers(calls: list[Any], check: Callable[[], None]) -> list[Any]:
    """What the calls come to; raises what one of them raises as soon as it does, and what ``check`` raises."""
    left = calls
    while left:
        ended, left = ray.wait(left, num_returns=1, timeout=_SHOWN)
        ray.get(ended)
        check()
    return list(ray.get(calls))


def _death(calls: list[Any]) -> Exception | None:
    """The loss of a worker, of which the others may hear before we do, through the connections that it drops."""
    ray.wait(calls, num_returns=len(calls), timeout=10)
    for call in calls:
        try:
            ray.get(call, timeout=0)
        except _LOST as error:
            return error
        except (RayTaskError, GetTimeoutError):
            continue
    return None
