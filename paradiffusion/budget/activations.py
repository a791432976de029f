"""Peak memory of a piece of work, from the meta device: shapes and dtypes without any numbers.

Every tensor that an operation makes is followed from its birth to its release, through forward, backward and
recomputation, so that temporaries and checkpointing are counted as they happen. What is estimated is the library beneath:
kernels' workspaces, the allocator's rounding and fragmentation are not seen here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# What CUDA's autocast runs in bfloat16, and what in float32 (torch's documentation, "Autocast Op Reference").
LOWER = frozenset(
    [
        torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose2d, F.linear, F.scaled_dot_product_attention,
        torch.matmul, torch.bmm, torch.mm, torch.addmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm,
        Tensor.mm, Tensor.baddbmm,
    ]
)  # fmt: skip
UPPER = frozenset(
    [
        F.group_norm, torch.group_norm, F.layer_norm, torch.layer_norm, F.softmax, torch.softmax, Tensor.softmax, torch.pow,
        Tensor.pow, Tensor.__pow__, torch.rsqrt, Tensor.rsqrt, torch.exp, Tensor.exp, torch.log, Tensor.log, F.mse_loss,
        torch.cumsum, Tensor.cumsum, torch.norm, Tensor.norm,
    ]
)  # fmt: skip


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all storages that operations make while it is entered; ``peak`` is their largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}
        self._paused = False

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What is made within the block is not counted."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these: they were there before."""
        for tensor in tensors:
            self._follow(tensor, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._follow(leaf, 0 if self._paused else leaf.untyped_storage().nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _follow(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        self.live += size

        def released() -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.finalize(storage, released)


ATTENTION = F.scaled_dot_product_attention  # as torch has it: a pretended GPU puts another in its place


class FusedAttention(torch.autograd.Function):
    """The memory of fused attention: it keeps queries, keys, values, output, a sum per row and what it was given to add to the scores,
    and no L x L matrix of its own, which torch's decomposition on the meta device would make."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, rows, mask)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class CudaRules(TorchFunctionMode):
    """Forwards as a CUDA device would run them: fused attention, and autocast's dtypes where ``trained`` is given.

    Of those parameters autocast keeps a bfloat16 copy from their first use on, which ``tracker`` does not count. (Copies made
    before the first use would be the last that the way back comes to, with the gradients of all of them.)"""

    def __init__(self, trained: Iterable[Tensor] | None, tracker: LiveBytes) -> None:
        super().__init__()
        self.copies: dict[int, Tensor | None] | None = None if trained is None else {id(p): None for p in trained}
        self.tracker = tracker

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self.copies is not None and func in LOWER:
            args, kwargs = tree_map(self._lower, args), tree_map(self._lower, kwargs)
        elif self.copies is not None and func in UPPER:
            args, kwargs = tree_map(_upper, args), tree_map(_upper, kwargs)
        if func is ATTENTION:
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            return FusedAttention.apply(*args[:3], mask) if len(args) >= 3 else func(*args, **kwargs)
        return func(*args, **kwargs)

    def _lower(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        assert self.copies is not None
        if id(value) not in self.copies:
            return value.to(torch.bfloat16)
        copy = self.copies[id(value)]
        if copy is None:
            with self.tracker.pause():
                copy = self.copies[id(value)] = value.to(torch.bfloat16)
        return copy


def _upper(value: Any) -> Any:
    lower = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if lower else value


def peak_bytes(work: Callable[[], Any], modules: Iterable[nn.Module], autocast: bool = False) -> int:
    """Bytes that ``work``, on meta tensors, needs at its peak beyond the modules' parameters, buffers and gradients; where it returns a
    loss that needs a gradient, on the way back too. With ``autocast`` as under ``torch.autocast("cuda", torch.bfloat16)``, whose copies
    of trained parameters are not counted."""
    modules = list(modules)
    parameters = [p for module in modules for p in module.parameters()]
    trained = [p for p in parameters if p.requires_grad]

    def drop(parameter: Tensor) -> None:
        parameter.grad = None  # gradients are counted exactly elsewhere

    handles = [p.register_post_accumulate_grad_hook(drop) for p in trained]
    tracker = LiveBytes()
    tracker.ignore([*parameters, *(b for module in modules for b in module.buffers())])
    try:
        with tracker, CudaRules(trained if autocast else None, tracker):
            result = work()
            if isinstance(result, Tensor) and result.requires_grad:
                # What backward() calls. backward() itself is a torch function, within which the rules are off, also for
                # what checkpointing recomputes.
                one = (torch.ones_like(result),)
                _engine_run_backward((result,), one, False, False, (), allow_unreachable=True, accumulate_grad=True)
    finally:
        for handle in handles:
            handle.remove()
    return tracker.peak
