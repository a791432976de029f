"""A pretended GPU for machines without one: tensors on "cuda" have shapes, dtypes and strides, but no numbers.

Within ``pretend()`` torch says that there is one GPU. CPU tensors are real; what is made on "cuda", or moved there, is a FakeTensor.
Operands on two devices or of two dtypes raise what CUDA would raise, float64 what MPS would; what the host reads, what is copied between
host and device, and the bytes of all that lives on the device are counted. Blind to kernels, values, NCCL, DeepSpeed and bitsandbytes;
transformers leaves out its own synchronisations for fake tensors.
"""

from __future__ import annotations

import time
import traceback
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

WRITTEN_FOR = "2.14"
# It changes private names of torch, which the next version may call otherwise.
needs_its_torch = pytest.mark.skipif(
    not torch.__version__.startswith(WRITTEN_FOR) or torch.version.cuda is None or torch.cuda.is_available(),
    reason=f"the pretended GPU takes the place of none in the CUDA build of torch {WRITTEN_FOR}",
)

# What CUDA refuses to run on two floating dtypes, and shapes alone do not tell.
ONE_DTYPE = {"mm", "addmm", "bmm", "baddbmm", "convolution", "native_group_norm", "native_layer_norm", "addmv", "dot"}
# What must know numbers to know how many they are.
COUNTS_NUMBERS = {"nonzero", "masked_select", "_unique2", "unique_consecutive"}
PAGE = 512  # the allocator's: bytes are rounded up to it


def place() -> str:
    """The innermost line of the project that led here, as "training/ema.py:45 text of it"; a library's where there is none."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    own = [frame for frame in frames if "/paradiffusion/" in frame.filename]
    frame = own[-1] if own else [f for f in frames if "/torch/" not in f.filename][-1]
    return f"{frame.filename.rpartition('/paradiffusion/')[2]}:{frame.lineno} {frame.line}"


def leaves(values: Iterable[Any]) -> Iterator[Any]:
    """What stands in nested lists and tuples."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from leaves(value)
        else:
            yield value


class Gpu(TorchDispatchMode):
    """Attributes:
    phase: whatever the test calls the work of the moment; counts are kept by it.
    reads: (phase, line) of numbers that the host waited for; blocking: of copies that it did.
    copies: (phase, line) of all others between host and device.
    live, peak: bytes on the device now, and at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.reads: Counter[tuple[str, str]] = Counter()
        self.blocking: Counter[tuple[str, str]] = Counter()
        self.copies: Counter[tuple[str, str]] = Counter()
        self.live = self.peak = 0
        self._made = FakeTensorMode(allow_non_fake_inputs=True)
        self._known: dict[int, Any] = {}
        self._pinned: dict[int, Any] = {}

    def forget(self) -> None:
        """Begin to count anew."""
        for counts in (self.reads, self.blocking, self.copies):
            counts.clear()

    def pin(self, tensor: Tensor, *_: Any) -> Tensor:
        """``Tensor.pin_memory``: a copy that is known to be pinned."""
        with torch._C.DisableTorchFunction():
            copy = tensor.clone()
        storage = copy.untyped_storage()
        self._pinned[id(storage)] = weakref.finalize(storage, self._pinned.pop, id(storage))
        return copy

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        kwargs = kwargs or {}
        tensors = [x for x in leaves((*args, *kwargs.values())) if isinstance(x, Tensor)]
        fakes = [x for x in tensors if isinstance(x, FakeTensor)]
        asked = kwargs.get("device") or next((x for x in args if isinstance(x, torch.device)), None)
        to = None if asked is None else torch.device(asked).type
        if not fakes and to != "cuda":
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if name in ("_local_scalar_dense", "item", "equal", "is_nonzero"):
            self.reads[self.phase, place()] += 1
            return 1.0 if fakes[0].dtype.is_floating_point and name.endswith(("item", "dense")) else 1
        if name in COUNTS_NUMBERS:
            self.reads[self.phase, place()] += 1
        if fakes and to == "cpu":
            self._copied(None, kwargs.get("non_blocking"))
            return torch.ones(fakes[0].shape, dtype=kwargs.get("dtype") or fakes[0].dtype)
        if name == "copy_" and len(fakes) < len(tensors):
            self._copied(args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            if not isinstance(args[0], FakeTensor):
                return args[0]
        elif tensors and not fakes:
            self._copied(tensors[0], kwargs.get("non_blocking"))
        if name in ONE_DTYPE and len(found := {x.dtype for x in tensors if x.dtype.is_floating_point}) > 1:
            raise RuntimeError(f"{name}: expected one dtype, found {sorted(map(str, found))}")
        if name.startswith("_foreach_") and len({isinstance(x, FakeTensor) for x in tensors if x.ndim}) > 1:
            raise RuntimeError(f"{name}: expected all tensors on one device")  # which fake tensors do not look at
        with self._made:
            if len(fakes) < len(tensors):
                args, kwargs = tree_map(self._fake, (args, kwargs))
            out = func(*args, **kwargs)
        for leaf in leaves([out]):
            if isinstance(leaf, FakeTensor) and leaf.fake_device.type == "cuda":
                if leaf.dtype == torch.float64:
                    raise TypeError(f"{name}: float64, which Apple's GPUs do not have, in {place()}")
                self._follow(leaf)
        return out

    def _fake(self, value: Any) -> Any:
        is_real = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
        return self._made.from_tensor(value) if is_real else value

    def _copied(self, source: Tensor | None, non_blocking: bool | None) -> None:
        """``source``, if it lies on the host, must be pinned for a copy that nobody waits for."""
        if source is not None and not isinstance(source, FakeTensor):
            non_blocking = non_blocking and id(source.untyped_storage()) in self._pinned
        (self.copies if non_blocking else self.blocking)[self.phase, place()] += 1

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        size = -(-storage.nbytes() // PAGE) * PAGE
        self.live += size
        self.peak = max(self.peak, self.live)

        def released() -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.finalize(storage, released)


_attention = F.scaled_dot_product_attention


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, **rest: Any,
) -> Tensor:  # fmt: skip
    """Fused attention of the kind that torch chooses on a GPU: flash in half precision without a mask, else memory-efficient."""
    if not isinstance(query, FakeTensor):
        return _attention(query, key, value, attn_mask, dropout_p, is_causal, **rest)
    if torch.is_autocast_enabled("cuda"):
        lower = torch.get_autocast_dtype("cuda")
        query, key, value = (x.to(lower) for x in (query, key, value))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(lower)
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(f"attention of {query.dtype}, {key.dtype}, {value.dtype}")
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError(f"attention of {query.dtype} with a mask of {attn_mask.dtype}")
    if query.dtype != torch.float32 and attn_mask is None and query.shape[-1] <= 256:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, False)[0]
    bias = attn_mask
    if bias is not None:
        bias = torch.where(bias, 0.0, float("-inf")).to(query.dtype) if bias.dtype == torch.bool else bias
        bias = bias.expand(*query.shape[:3], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, True, 0.0, is_causal)[0]


_task = -1  # the number of the way back that is under way, which checkpointing asks for


def run_backward(
    outputs: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...], keep_graph: bool, create_graph: bool,
    inputs: tuple[Tensor, ...], **rest: bool,
) -> tuple[()]:  # fmt: skip
    """torch.autograd's engine, which would ask CUDA for its context, in Python: nodes in the order of their sequence numbers, each
    released once it has run."""
    global _task
    assert not inputs and not create_graph
    _task = time.monotonic_ns()
    waiting: Counter[Any] = Counter()
    given: dict[Any, dict[int, Tensor]] = {}
    for output, gradient in zip(outputs, gradients, strict=True):
        one = torch.ones_like(output) if gradient is None else gradient
        given.setdefault(output.grad_fn, {})[output.output_nr] = one
        output.detach_()  # or the caller's loss would hold the whole graph
    seen, stack = set(), list(given)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        following = [other for other, _ in node.next_functions if other is not None]
        waiting.update(following)
        stack += following
    ready = [node for node in given if not waiting[node]]
    del seen, stack, node, following, output, gradient
    with torch.no_grad():
        while ready:
            node = ready.pop(max(range(len(ready)), key=lambda at: order(ready[at])))
            own = given.pop(node, {})
            edges = node.next_functions
            found = run_node(node, own) if own else (None,) * len(edges)
            del node, own
            for (other, number), gradient in zip(edges, found, strict=True):
                if other is None:
                    continue
                waiting[other] -= 1
                if gradient is not None:
                    slot = given.setdefault(other, {})
                    slot[number] = gradient if number not in slot else slot[number] + gradient
                if not waiting[other]:
                    ready.append(other)
            other = gradient = slot = None
            del edges, found
    _task = -1
    return ()


def order(node: Any) -> float:
    """What goes first: accumulation, then what was made last on the way forth."""
    return float("inf") if "AccumulateGrad" in type(node).__name__ else node._sequence_nr()


def run_node(node: Any, own: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    """One node's gradients of its inputs, from those of its outputs by number."""
    shaped: list[Tensor | None] = []
    for number, metadata in enumerate(node._input_metadata):
        gradient = own.get(number)
        if gradient is not None:
            if gradient.shape != torch.Size(metadata.shape):
                gradient = gradient.sum_to_size(tuple(metadata.shape))
            if gradient.dtype != metadata.dtype:
                gradient = gradient.to(metadata.dtype)
            if gradient.device != metadata.device:
                raise RuntimeError(f"{type(node).__name__}: a gradient on {gradient.device} for a tensor on {metadata.device}")
        shaped.append(gradient)
    found = node(*shaped)
    return found if isinstance(found, tuple) else (found,)


def swap(one: Any, other: Any) -> None:
    """``Module.to`` of a fake parameter: to another dtype or layout."""
    one.data = other.data
    one._fake_device = other._fake_device


@contextmanager
def pretend() -> Iterator[Gpu]:
    """Within it there is one GPU, and this is it."""
    gpu = Gpu()
    cuda = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "set_device": lambda d: None,
        "_lazy_init": lambda: None, "is_bf16_supported": lambda *_, **__: True, "get_device_capability": lambda *_: (9, 0),
        "synchronize": lambda *_: None, "empty_cache": lambda: None, "max_memory_allocated": lambda *_: gpu.peak,
        "max_memory_reserved": lambda *_: gpu.peak, "reset_peak_memory_stats": lambda *_: setattr(gpu, "peak", gpu.live),
        "get_device_name": lambda *_: "pretended GPU", "get_device_properties": lambda *_: SimpleNamespace(total_memory=80 << 30),
        "manual_seed": lambda *_: None, "manual_seed_all": lambda *_: None,
        "get_rng_state": lambda *_: torch.empty(0), "set_rng_state": lambda *_: None,
    }  # fmt: skip
    others = {
        "torch.utils.swap_tensors": swap,
        "torch.nn.functional.scaled_dot_product_attention": attention,
        "torch.autograd._engine_run_backward": run_backward,
        "torch.autograd.graph._engine_run_backward": run_backward,
        "torch._C._current_graph_task_id": lambda: _task,
        "torch.Tensor.pin_memory": lambda tensor, *_: gpu.pin(tensor),
    }
    with ExitStack() as stack:
        for name, value in [*((f"torch.cuda.{name}", value) for name, value in cuda.items()), *others.items()]:
            stack.enter_context(mock.patch(name, value))
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is made here, then moved
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        torch._C._ensureCUDADeviceGuardSet()  # no driver is asked for devices and streams from here on
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(gpu)
        yield gpu
