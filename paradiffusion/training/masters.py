"""The fp32 weights that are trained, as this process holds them: whole, or in pieces under ZeRO.

The average, checkpoints and validation work on these, so they need not know how a run was launched. A value of the
weights' kind (the average, a moment of the optimiser) is a list of tensors of the same shapes as ``tensors()``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

Values = Sequence[Tensor]


class Masters(Protocol):
    """Attributes:
    names: of the trained parameters, in a fixed order.
    """

    names: list[str]

    def tensors(self) -> list[Tensor]:
        """This process's fp32 weights, live."""
        ...

    def full(self, values: Values) -> Iterator[tuple[str, Tensor]]:
        """Name and whole tensor (fp32, CPU) of each parameter in the main process; nothing in the others, which must
        call this too."""
        ...

    def fill(self, values: Values, read: Callable[[str], Tensor]) -> None:
        """Set ``values`` from whole tensors by name."""
        ...

    def refresh(self) -> None:
        """Bring the weights that the model computes with up to date, after ``tensors()`` were changed."""
        ...


class WholeMasters:
    """One process or DDP: every process holds every parameter, and computes with it."""

    def __init__(self, parameters: dict[str, nn.Parameter], main: bool) -> None:
        self.parameters, self.main = parameters, main
        self.names = list(parameters)

    def tensors(self) -> list[Tensor]:
        return [parameter.data for parameter in self.parameters.values()]

    def full(self, values: Values) -> Iterator[tuple[str, Tensor]]:
        if self.main:
            for name, value in zip(self.names, values, strict=True):
                yield name, value.detach().float().cpu().contiguous()

    def fill(self, values: Values, read: Callable[[str], Tensor]) -> None:
        for name, value in zip(self.names, values, strict=True):
            value.copy_(read(name))

    def refresh(self) -> None:
        pass


@dataclass(frozen=True)
class Piece:
    """Elements ``start`` .. ``start + length`` of a parameter, which lie at ``offset`` in this process's tensor ``number``."""

    number: int
    offset: int
    start: int
    length: int


class PiecedMasters:
    """ZeRO: each process holds flat tensors with pieces of the parameters.

    Args:
        shapes: of the whole parameters, by name.
        pieces: what this process holds of each; a parameter may lie wholly elsewhere.
    """

    def __init__(
        self,
        shapes: dict[str, torch.Size],
        flat: list[Tensor],
        pieces: dict[str, Piece],
        device: torch.device,
        refresh: Callable[[], None],
    ) -> None:
        self.names = list(shapes)
        self.shapes, self.flat, self.pieces, self.device, self._refresh = shapes, flat, pieces, device, refresh

    def tensors(self) -> list[Tensor]:
        return [tensor.data for tensor in self.flat]

    def full(self, values: Values) -> Iterator[tuple[str, Tensor]]:
        main = dist.get_rank() == 0
        for name, shape in self.shapes.items():
            # Each element is held by one process, so the sum is the element itself.
            whole = torch.zeros(shape.numel(), device=self.device)
            if (piece := self.pieces.get(name)) is not None:
                own = values[piece.number].view(-1)[piece.offset : piece.offset + piece.length]
                whole[piece.start : piece.start + piece.length] = own.to(self.device)
            dist.reduce(whole, dst=0)
            if main:
                yield name, whole.view(shape).cpu()

    def fill(self, values: Values, read: Callable[[str], Tensor]) -> None:
        for name, piece in self.pieces.items():
            part = read(name).reshape(-1)[piece.start : piece.start + piece.length]
            values[piece.number].view(-1)[piece.offset : piece.offset + piece.length] = part.to(
                values[piece.number].device
            )

    def refresh(self) -> None:
        self._refresh()


def zero_masters(
    parameters: dict[str, nn.Parameter], optimizer: Any, stage: int, device: torch.device
) -> PiecedMasters:
    """The pieces that DeepSpeed's ZeRO optimiser gave this process, read from its own tables."""
    if stage < 3:
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        pieces = {}
        for name, parameter in parameters.items():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                high, low = mapping.hp_fragment_address, mapping.lp_fragment_address
                pieces[name] = Piece(mapping.param_group_index, high.start, low.start, high.numel)
        flat = list(optimizer.single_partition_of_fp32_groups)
        return PiecedMasters(shapes, flat, pieces, device, optimizer.update_lp_params)

    shapes = {name: parameter.ds_shape for name, parameter in parameters.items()}  # type: ignore[attr-defined]
    pieces = {}
    for name, parameter in parameters.items():
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = dist.get_rank() * size
        length = min(size, parameter.ds_numel - start)  # type: ignore[attr-defined]
        if length > 0:
            pieces[name] = Piece(group, offset, start, length)

    def refresh() -> None:
        optimizer._partition_all_parameters()
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        kept = optimizer.persistent_parameters  # small ones, which every process holds whole
        if kept:
            kept[0].all_gather(kept)

    return PiecedMasters(shapes, list(optimizer.fp32_partitioned_groups_flat), pieces, device, refresh)
