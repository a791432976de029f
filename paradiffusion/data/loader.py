"""Plan and shards to batches: this process's slice of every step, read in worker processes.

The main process plans (integers only) and tells the workers which bytes to read, so what a batch holds is a function of
(seed, step) and the data, whatever the number of workers, and any step can be the first one.
"""

from __future__ import annotations

import atexit
import math
import os
import pickle
import signal
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Final, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from paradiffusion.data.cache import Cache, Stored, collate
from paradiffusion.data.captions import count_words, is_dropped
from paradiffusion.data.images import Bucket, decode, to_array
from paradiffusion.data.index import SampleIndex
from paradiffusion.data.plan import BatchPlan, GlobalBatch
from paradiffusion.data.shards import Place, RawSample, read_place
from paradiffusion.errors import UserError
from paradiffusion.machine import own_cores
from paradiffusion.text.scores import scores_of
from paradiffusion.text.tokenizer import Tokens, tokenize_once

# Below so many samples read, a few bad ones say nothing about their share; and until all samples have been read once it
# must be over the limit by so many standard deviations. Else one bad sample in a thousand, under a limit of a hundredth,
# would stop one process in twenty, and so nearly every run of many.
_JUDGED_FROM, _DEVIATIONS = 64, 3.0
# A slice of a few slots may be wholly bad by chance; then other samples of the global batch stand in.
_SMALL_SLICE, _SPARES = 8, 4
# Requests of one worker at a time: each waits for its store or disk, and half of a batch on the way is enough to stay ahead.
_THREADS: Final = 16
_JOIN = 10.0  # seconds for a thread to end
T = TypeVar("T")
Tokenize = Callable[[list[str]], Tokens]


@dataclass(frozen=True)
class LoaderSettings:
    """How the plan is read.

    Steps ``first_step`` to ``last_step`` (exclusive; None: without end). Each step's slice of this rank comes in
    ``accumulation`` equal batches. ``workers`` are processes, each two batches ahead; 0 reads in this one, and None takes
    ``default_workers()``. ``tokenize`` is what they make ids of captions with, where ids are wanted.
    """

    seed: int = 0
    first_step: int = 0
    last_step: int | None = None
    rank: int = 0
    world_size: int = 1
    accumulation: int = 1
    caption_dropout: float = 0.0
    max_bad_fraction: float = 0.01
    workers: int | None = 2
    cache: Cache | None = None
    tokenize: Tokenize | None = None


@dataclass
class Failure:
    """A sample that could not be read, and why."""

    shard: str
    key: str
    error: str

    def __str__(self) -> str:
        return f"{self.shard}/{self.key}: {self.error}"


@dataclass(eq=False)
class Batch:
    """b samples of one bucket: micro-batch ``micro`` of this process's slice of the global batch of ``step``.

    ``pixels`` is uint8 [b, 3, H, W], a quarter of what the images take on their way to a GPU; ``taken`` are their places in the global
    batch; ``readable`` is False where a sample could not be read and another of the slice stands in. ``stored`` is what a cache has in
    the place of pixels (then none) or captions. A dropped caption is "". ``tokens`` are those of the different captions, with each
    caption's row int64 [b] (see ``tokenize_once``), where they are wanted; ``scores`` the numbers in the samples' JSON (``scores_of``).
    ``keys`` are ``shard.tar/key``; ``failures`` say what was not read. Small parts are lists: each tensor takes a file handle on its way
    from a worker.
    """

    pixels: torch.Tensor
    captions: list[str]
    kinds: list[str]
    keys: list[str]
    readable: list[bool]
    failures: list[Failure] = field(default_factory=list)
    step: int = 0
    micro: int = 0
    taken: Sequence[int] = ()
    stored: Stored | None = None
    scores: list[dict[str, float]] = field(default_factory=list)
    tokens: tuple[Tokens, torch.Tensor] | None = None

    @property
    def slots(self) -> torch.Tensor:
        """int64 [b], places in the global batch, from which timesteps and noise are drawn."""
        return torch.tensor(self.taken)

    @property
    def weights(self) -> torch.Tensor:
        """float32 [b], 0 where another sample stands in."""
        return torch.tensor(self.readable, dtype=torch.float32)

    @property
    def words(self) -> list[int]:
        """Of each caption."""
        return [*map(count_words, self.captions)]

    @property
    def images(self) -> torch.Tensor:
        """float32 [b, 3, H, W] in -1..1."""
        return scale_pixels(self.pixels)

    def pin_memory(self) -> Batch:
        """For the DataLoader: from pinned memory the pixels travel to a GPU while it computes."""
        self.pixels = self.pixels.pin_memory()
        self.stored = self.stored and self.stored.pin_memory()
        return self


def scale_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 in 0..255 to float32 in -1..1, on whatever device the pixels are."""
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


@dataclass
class LoadReport:
    """Samples read so far, and those that could not be, counted by (shard, error)."""

    read: int = 0
    bad: Counter[tuple[str, str]] = field(default_factory=Counter)

    def summary(self) -> str:
        """One line for the log: how many were bad, and the commonest reasons."""
        reasons = ", ".join(f"{shard} {error} ({count})" for (shard, error), count in self.bad.most_common(5))
        return f"{self.bad.total()} of {self.read} samples could not be read" + (f": {reasons}" if reasons else "")


class Loader(Iterator[Batch]):
    """The batches of this process: of every step's slots each ``world_size``-th, in ``accumulation`` equal parts.

    A sample that cannot be read is replaced in its slot by a good one of the slice with weight 0 and counted in
    ``report``. Iterating raises UserError when a whole slice is bad, or over ``max_bad_fraction`` of what was read, by more
    than chance explains. Raises UserError when the batch does not split evenly.
    """

    _whole: float = math.inf  # how many samples there are; of a stream that is not known

    def __init__(self, index: SampleIndex, plan: BatchPlan, settings: LoaderSettings) -> None:
        self.index, self.plan = index, plan
        self._prepare(settings, plan.batch_size)
        self._whole = plan.samples

    def _prepare(self, settings: LoaderSettings, batch_size: int) -> None:
        self.settings = settings
        self.report = LoadReport()
        shares = settings.world_size * settings.accumulation
        if batch_size % shares:
            raise UserError(
                f"batch_size={batch_size} cannot be split evenly over {settings.world_size} processes times "
                f"{settings.accumulation} micro-batches: make it a multiple of {shares}."
            )
        self._size = batch_size // shares
        self._batches: Iterator[Batch] | None = None
        self._end: weakref.finalize[..., Loader] | None = None

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = HandOver(self._start()) if self._workers else self._start()
        try:
            batch = next(self._batches)
            self._judge(batch)
        except UserError:
            self.close()
            raise
        except (RuntimeError, EOFError, ConnectionError) as error:
            # A worker that dies is a RuntimeError of the DataLoader's, or one of the others where it was handing something over.
            if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in ("open files", "DataLoader worker (pid")):
                raise
            self.close()
            raise UserError(
                f"A process that reads data has died, or cannot hand over its batches ({type(error).__name__} {error}): set data.workers "
                "lower, enlarge /dev/shm in a container, or raise the limit of open files (ulimit -n)."
            ) from error
        return batch

    def close(self) -> None:
        """End the worker processes; the loader yields nothing more."""
        if self._end:
            self._end()  # First: the thread waits for a worker, which may be at a slow store for minutes.
        if isinstance(self._batches, HandOver):
            self._batches.close()
        self._batches = iter(())

    def _start(self) -> Iterator[Batch]:
        orders = _told_ahead(_orders(self.index, self.plan, self.settings, self._size), max(self._workers, 1))
        return self._serve(Reader(self.settings.cache, self.settings.tokenize), orders)

    @property
    def _workers(self) -> int:
        return default_workers() if self.settings.workers is None else self.settings.workers

    def _serve(self, data: Dataset[Any], orders: Iterable[Order] | None) -> Iterator[Any]:
        """What ``data`` makes of ``orders``, in worker processes; an iterable data set needs none."""
        workers = self._workers
        on_child_exit = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        # Workers inherit it: a signal that comes before they ignore it (guard_worker) would end them.
        mask = set_mask("SIG_BLOCK", (signal.SIGINT, signal.SIGTERM))
        try:
            ended, end = Pipe(duplex=False)
            self._end = weakref.finalize(self, _tell_workers, ended, end, os.getpid())
            batches = iter(
                DataLoader(
                    data, batch_size=None, sampler=orders, num_workers=workers, collate_fn=pass_on,
                    worker_init_fn=partial(guard_worker, ended=ended) if workers else None, pin_memory=torch.cuda.is_available(),
                    generator=torch.Generator(),  # Its own: DataLoader would otherwise draw from the global generator.
                )
            )  # fmt: skip
        except OSError as error:
            self.close()
            raise UserError(
                f"Reading with data.workers={workers} cannot be started ({error.strerror or error}): set it lower (0 reads in this "
                "process), or raise the limits of open files (ulimit -n), of processes or of /dev/shm."
            ) from error
        finally:
            set_mask("SIG_SETMASK", mask)
        # DataLoader would raise the death of a worker out of this signal, in the midst of a step or a save. Without
        # that it still notices, when the next batch is asked for.
        if on_child_exit is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, on_child_exit)
        # Registered after the workers have started, so called before multiprocessing waits for them: they ignore its
        # SIGTERM, and a program that ends without close() would wait for ever. Nothing of the loader is kept by it.
        atexit.register(self._end)
        return _unpack(batches)

    def _judge(self, batch: Batch) -> None:
        """Count what was read; raise UserError when too much of it was bad."""
        report = self.report
        report.read += self._size
        report.bad.update((failure.shard, failure.error) for failure in batch.failures)
        if not batch.failures:
            return
        allowed = self.settings.max_bad_fraction * report.read
        if report.read < self._whole:
            allowed += _DEVIATIONS * math.sqrt(allowed)
        too_many = report.read >= _JUDGED_FROM and report.bad.total() > allowed
        if too_many or not batch.keys:
            raise UserError(
                f"{report.bad.total()} of {report.read} samples could not be read (the last one "
                f"{batch.failures[-1]}), and data.max_bad_fraction is {self.settings.max_bad_fraction}: "
                "mend or leave out that shard, or raise the limit."
            )


def default_workers() -> int:
    """Processes that read for this one: its share of the cores, at most 8, at least 1."""
    return min(8, own_cores())


def slots_of(rank: int, world_size: int, size: int, micro: int) -> range:
    """The slots of the global batch that a process takes in its ``micro``-th part of ``size`` samples.

    A batch is sorted by caption length: every ``world_size``-th slot of a part gives all processes texts of the same
    lengths, so that none of them waits for another.
    """
    together = world_size * size
    return range(micro * together + rank, (micro + 1) * together, world_size)


def make_loader(index: SampleIndex, plan: BatchPlan, settings: LoaderSettings) -> Loader:
    return Loader(index, plan, settings)


def _tell_workers(ended: Connection, end: Connection, owner: int) -> None:
    """Say that the loader has ended. ``ended`` is kept open here for as long as there is something to say."""
    if os.getpid() == owner:  # Not where a forked process drops its copy of the loader.
        end.send_bytes(b"end")


def _orders(index: SampleIndex, plan: BatchPlan, settings: LoaderSettings, size: int) -> Iterator[Order]:
    """What to read, in order. Knows no loader: in a cycle of references, one that nobody needs would keep its workers alive."""
    step = settings.first_step
    while settings.last_step is None or step < settings.last_step:
        batch = plan.batch(step)

        def look_up(slots: Iterable[int], batch: GlobalBatch = batch) -> list[tuple[Place, str]]:
            return [(index.place(int(batch.rows[slot])), index.kinds[batch.kinds[slot]]) for slot in slots]

        for micro in range(settings.accumulation):
            slots = slots_of(settings.rank, settings.world_size, size, micro)
            others = [*range(slots.start + 1, len(batch.rows)), *range(slots.start)]
            spares = look_up([s for s in others if s not in slots][:_SPARES]) if size < _SMALL_SLICE else []
            dropped = [is_dropped(settings.seed, step, slot, settings.caption_dropout) for slot in slots]
            yield Order(step, micro, batch.bucket, look_up(slots), slots, dropped, spares)
        step += 1


def _told_ahead(orders: Iterator[Order], gap: int) -> Iterator[Order]:
    """Orders go to the workers in turn, so the one ``gap`` later goes to the same: it is told now, to be fetched meanwhile."""
    waiting: deque[Order] = deque()
    for order in orders:
        waiting.append(order)
        if len(waiting) > gap:
            yield replace(waiting.popleft(), ahead=order)
    yield from waiting


# What the worker processes of the loader do: read the samples of an order and make the pixels of one batch.


@dataclass
class Order:
    """What a worker is to read: the samples of one batch, and stand-ins. ``ahead`` is what the same worker is going to read next."""

    step: int
    micro: int
    bucket: Bucket
    wanted: list[tuple[Place, str]]  # with the kind of caption
    slots: range
    dropped: list[bool]
    spares: list[tuple[Place, str]]
    ahead: Order | None = None


@dataclass
class Sample:
    """One sample as it was read."""

    pixels: np.ndarray  # uint8 [H, W, 3]
    caption: str
    kind: str
    key: str
    stored: Stored | None = None
    scores: dict[str, float] = field(default_factory=dict)


class Reader(Dataset[Batch]):
    """Reads one order at a time. Holds no index, so that workers stay small."""

    def __init__(self, cache: Cache | None = None, tokenize: Tokenize | None = None) -> None:
        self.cache, self.tokenize = cache, tokenize
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[tuple[int, int], list[Future[RawSample]]] = {}

    def __getitem__(self, order: Order) -> Batch:
        read = [self._read(*wanted, order.bucket, get) for wanted, get in zip(order.wanted, self._take(order), strict=True)]
        failures = [sample for sample in read if isinstance(sample, Failure)]
        good = [sample for sample in read if not isinstance(sample, Failure)]
        spares = iter(order.spares)
        while not good and (spare := next(spares, None)):
            sample = self._read(*spare, order.bucket, partial(self._fetch, spare[0]))
            good += [] if isinstance(sample, Failure) else [sample]
        filled = [good[slot % len(good)] if isinstance(one, Failure) else one for slot, one in enumerate(read) if good]
        batch = make_batch(filled, [not isinstance(one, Failure) for one in read if good], failures)
        return placed(batch, order.step, order.micro, order.slots, order.dropped, self.tokenize)

    def _take(self, order: Order) -> list[Callable[[], RawSample]]:
        """Functions that give the samples of ``order``, or raise what reading them raised. Threads fetch them, and those of the
        worker's next order while this one is decoded: a store and a network disk answer late, each time."""
        ahead, order.ahead = order.ahead, None
        futures = self._coming.pop((order.step, order.micro), None) or self._submit(order)
        # What was fetched for a batch that went to another worker would else stay for ever.
        self._coming = {(ahead.step, ahead.micro): self._submit(ahead)} if ahead else {}
        return [future.result for future in futures]

    def _submit(self, order: Order) -> list[Future[RawSample]]:
        self._pool = self._pool or ThreadPoolExecutor(_THREADS, "fetch")  # Made in the worker: threads survive no fork.
        return [self._pool.submit(self._fetch, place) for place, _ in order.wanted]

    def _fetch(self, place: Place) -> RawSample:
        return read_place(place if self.cache is None else self.cache.slim(place))

    def _read(self, place: Place, kind: str, bucket: Bucket, get: Callable[[], RawSample]) -> Sample | Failure:
        try:
            raw = get()
            if self.cache is None or self.cache.latents is None:
                pixels = to_array(decode(raw.image, cover=bucket), bucket, place.id)
            else:
                pixels = np.zeros((0, 0, 3), np.uint8)
            caption = raw.meta["captions"].get(kind)
            if not caption:
                raise ValueError(f"no caption of kind {kind}: the shard has changed since it was indexed")
            stored = None if self.cache is None else self.cache.read(place, caption)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            return Failure(place.shard.name, place.key, reason)
        return Sample(pixels, caption, kind, f"{place.shard.name}/{place.key}", stored, scores_of(raw.meta))


def make_batch(samples: list[Sample], readable: list[bool], failures: list[Failure]) -> Batch:
    """One batch of ``samples``, all of one size; of none there are no pixels."""
    stored = [sample.stored for sample in samples if sample.stored]
    pixels = join_pixels([sample.pixels for sample in samples]) if samples else torch.empty(0)
    captions, kinds, keys = ([getattr(sample, name) for sample in samples] for name in ("caption", "kind", "key"))
    scores = [sample.scores for sample in samples]
    return Batch(pixels, captions, kinds, keys, readable, failures, stored=collate(stored) if stored else None, scores=scores)


def placed(batch: Batch, step: int, micro: int, slots: range, dropped: list[bool], tokenize: Tokenize | None) -> Batch:
    """``batch`` in its place in a step, with those captions dropped, and tokenised where that is wanted."""
    batch.step, batch.micro, batch.taken = step, micro, slots
    batch.captions = ["" if drop else caption for drop, caption in zip(dropped, batch.captions, strict=False)]  # of none there are none
    batch.tokens = tokenize_once(tokenize, batch.captions) if tokenize and batch.captions else None
    return batch


def join_pixels(pictures: list[np.ndarray]) -> torch.Tensor:
    """uint8 [b, 3, H, W] of b pictures [H, W, 3], written once: to turn the whole batch around takes twice as long."""
    tall, wide, _ = pictures[0].shape
    joined = np.empty((len(pictures), 3, tall, wide), np.uint8)
    for place, picture in zip(joined, pictures, strict=True):
        place[:] = picture.transpose(2, 0, 1)
    return torch.from_numpy(joined)


def set_mask(how: str, signals: Iterable[int]) -> Iterable[int]:
    """``signal.pthread_sigmask``, which Windows does not have."""
    return signal.pthread_sigmask(getattr(signal, how), signals) if hasattr(signal, "pthread_sigmask") else ()


def guard_worker(number: int, ended: Connection) -> None:
    """Let the parent decide when a worker ends, and end with it. ``ended`` has something to read once it decides so.

    Ctrl-C and a scheduler's SIGTERM reach the whole process group, but the parent still needs batches while it saves
    and leaves. When the parent is killed outright, a worker that is blocked in a full pipe would live on for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    set_mask("SIG_UNBLOCK", (signal.SIGINT, signal.SIGTERM))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Its threads survive no fork, of which it would warn.
    threading.Thread(target=_end_with, args=(os.getppid(), ended), daemon=True).start()


def _end_with(parent: int, ended: Connection) -> None:
    """Poll, and leave the word unread, since the other workers wait for it too."""
    while os.getppid() == parent:
        if ended.poll(1.0):
            # DataLoader's own way of ending is quicker and tidier, but it is lost where the garbage collector frees a
            # loader (its queues close before its __del__ runs), and its last means is the SIGTERM that is ignored here.
            time.sleep(1.0)
            break
    os._exit(0)


# A batch on its way from a worker process: in shared memory, or copied through the pipe where that has no room. A DataLoader
# moves tensors into shared memory in a thread of the worker, and there an error is only printed: the batch never comes, and
# the parent waits for ever. That is what a container does with its 64 MB of /dev/shm.


@dataclass
class Copied:
    """A batch as bytes, between processes of one program, and why it had to be."""

    content: bytes
    reason: str


def pass_on(item: Any) -> Any:
    """In a worker: ``item`` (a Batch) with its tensors in shared memory, else Copied. Elsewhere as it is.

    For the DataLoader's ``collate_fn``: what is raised there reaches the parent.
    """
    if get_worker_info() is None:
        return item
    batch: Batch = item
    tensors: list[torch.Tensor | None] = [batch.pixels]
    if batch.stored is not None:
        tensors += [batch.stored.latents, batch.stored.features]
    if batch.tokens is not None:
        tensors += [batch.tokens[0].ids, batch.tokens[0].mask, batch.tokens[1]]
    try:
        for tensor in tensors:
            if tensor is not None:
                tensor.share_memory_()
    except (RuntimeError, OSError) as error:
        return Copied(pickle.dumps(item, pickle.HIGHEST_PROTOCOL), str(error).rpartition(": ")[2])
    return item


def _unpack(items: Iterator[Any]) -> Iterator[Any]:
    """In the parent: what ``pass_on`` has passed on. The first copy is told, on one process of each machine."""
    told = os.environ.get("LOCAL_RANK", "0") != "0"
    for item in items:
        if isinstance(item, Copied):
            if not told:
                print(
                    f"a batch cannot be put into shared memory ({item.reason}), so batches are copied between processes, which "
                    "is slower: enlarge /dev/shm (docker run --shm-size=16g, or --ipc=host), raise the limit of open files "
                    "(ulimit -n), or set data.workers lower.",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
            told = True
            item = pickle.loads(item.content)
        yield item


class HandOver(Iterator[T], Generic[T]):
    """``source``, one item ahead, taken in a thread; what it raises is raised here, in its place. ``close`` ends the thread.

    A tensor's memory changes hands over a socket that the worker has to answer on: about 5 ms a batch, which a training step
    would spend waiting although the batch was made long ago.
    """

    def __init__(self, source: Iterator[T]) -> None:
        self._source, self._pool = source, ThreadPoolExecutor(1, "batches")
        self._coming = self._pool.submit(next, source)

    def __next__(self) -> T:
        item = self._coming.result()  # After an error or the end the same comes again.
        self._coming = self._pool.submit(next, self._source)
        return item

    def close(self) -> None:
        """Nothing more is taken. Waits while the source makes its next item, but not for ever."""
        wait([self._coming], _JOIN)
        self._pool.shutdown(wait=False)
