"""A batch on its way from a worker process: in shared memory, or copied through the pipe where that has no room.

A DataLoader moves tensors into shared memory in a thread of the worker, and there an error is only printed: the batch
never comes, and the parent waits for ever. That is what a container does with its 64 MB of /dev/shm.
"""

from __future__ import annotations

import os
import pickle
import sys
from dataclasses import dataclass
from typing import Any

from torch.utils.data import get_worker_info

from paradiffusion.data.reader import Delivery, Order

Item = tuple[Order, Delivery]


@dataclass
class Copied:
    """A batch as bytes, between processes of one program, and why it had to be."""

    content: bytes
    reason: str


def pass_on(item: Any) -> Any:
    """In a worker: ``item`` (an Item) with its tensors in shared memory, else Copied. Elsewhere ``item`` itself.

    For the DataLoader's ``collate_fn``: what is raised there reaches the parent.
    """
    if get_worker_info() is None:
        return item
    delivery: Delivery = item[1]
    tensors = [delivery.pixels]
    if delivery.stored is not None:
        tensors += [one for one in (delivery.stored.latents, delivery.stored.features) if one is not None]
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except (RuntimeError, OSError) as error:
        return Copied(pickle.dumps(item, pickle.HIGHEST_PROTOCOL), str(error).rpartition(": ")[2])
    return item


class Unpack:
    """In the parent: what ``pass_on`` has passed on. The first copy is told, on one process of each machine."""

    def __init__(self) -> None:
        self.told = False

    def __call__(self, item: Item | Copied) -> Item:
        if not isinstance(item, Copied):
            return item
        if not self.told and os.environ.get("LOCAL_RANK", "0") == "0":
            print(
                f"a batch cannot be put into shared memory ({item.reason}), so batches are copied between processes, which is "
                "slower: enlarge /dev/shm (docker run --shm-size=16g, or --ipc=host), raise the limit of open files (ulimit "
                "-n), or set data.workers lower.",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        self.told = True
        unpacked: Item = pickle.loads(item.content)
        return unpacked
