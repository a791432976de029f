"""The Inception network of the FID: features of pictures as the score's authors took them.

That is not torchvision's network for ImageNet: it is the graph that was published on 2015-12-05 with TensorFlow, of 1008
classes, whose weights were carried over to PyTorch by the project pytorch-fid and are used by torch-fidelity, clean-fid and
torchmetrics. It differs in its weights, in average pooling that does not count the padding, and in a maximum where the last
block should average. A FID by another network is another number.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from paradiffusion.errors import UserError

SIZE: Final = 299  # pixels
WIDTH: Final = 2048  # of the features: the last average pooling, "pool3"
CLASSES: Final = 1008
WEIGHTS: Final = "pt_inception-2015-12-05-6726825d.pth"
PUBLISHED: Final = "6726825d"  # with what the file's SHA-256 begins, as its name says
_HINT: Final = f"get {WEIGHTS} from the releases of the project mseitzer/pytorch-fid and give its path as inception="


def prepare(image: Image.Image) -> torch.Tensor:
    """float32 [3, 299, 299] of an RGB image, in -1 to 1, as the published graph reads it.

    Values are (v - 128) / 128 of 0..255, and the resize is TensorFlow 1's bilinear one: pixel i of the result lies at
    i * size / 299 of the picture, with no half-pixel shift and no smoothing when it shrinks (torch-fidelity does the same;
    pytorch-fid shifts by half a pixel, which moves FID in the second decimal).
    """
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)  # [3, H, W]
    return (resize(pixels, SIZE, SIZE) - 128) / 128


def resize(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """float32 [..., height, width] of ``pixels`` [..., H, W], as TensorFlow 1's ``resize_bilinear`` without aligned corners."""
    rows, columns = _taps(pixels.shape[-2], height), _taps(pixels.shape[-1], width)
    pixels = torch.lerp(pixels[..., rows[0], :], pixels[..., rows[1], :], rows[2][:, None])
    return torch.lerp(pixels[..., columns[0]], pixels[..., columns[1]], columns[2])


def _taps(size: int, wanted: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each of ``wanted`` pixels the two of ``size`` that it lies between, and how near it is to the second."""
    place = torch.arange(wanted, dtype=torch.float32) * (size / wanted)
    first = place.long().clamp_max(size - 1)
    return first, (first + 1).clamp_max(size - 1), place - first


class _PooledBlock(nn.Module):
    """A block of torchvision's whose last branch pools the way of the published graph."""

    def __init__(self, block: Any, pool: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        # Its parts become this module's own, so that the names of the weights stay what they are.
        self._modules = block._modules
        self._branches: Callable[[torch.Tensor], list[torch.Tensor]] = block._forward
        self._pool = pool
        self.branch_pool: nn.Module = block.branch_pool

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        *branches, _ = self._branches(pixels)
        return torch.cat([*branches, self.branch_pool(self._pool(pixels))], dim=1)


def _average(pixels: torch.Tensor) -> torch.Tensor:
    return functional.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(pixels: torch.Tensor) -> torch.Tensor:
    return functional.max_pool2d(pixels, 3, stride=1, padding=1)


def build() -> nn.Module:
    """The network with the layout of the published weights, not initialised; [B, 3, 299, 299] to [B, 1008]."""
    from torchvision.models import Inception3

    network = Inception3(num_classes=CLASSES, aux_logits=False, transform_input=False, init_weights=False)
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        setattr(network, f"Mixed_{name}", _PooledBlock(getattr(network, f"Mixed_{name}"), _average))
    network.Mixed_7c = _PooledBlock(network.Mixed_7c, _maximum)
    return network


class Inception:
    """The network in evaluation mode, with its weights."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.network: Any = network.eval().requires_grad_(False).to(device)
        self.network.fc = (
            nn.Identity()
        )  # features, not classes; torchvision's dropout before it does nothing in evaluation
        self.device = device

    @torch.inference_mode()
    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """float32 [B, 2048], on the CPU, of ``pixels`` [B, 3, 299, 299] from ``prepare``."""
        # TF32, cuDNN's default on GPUs, would leave three digits of a feature.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            return self.network(pixels.to(self.device)).float().cpu()


def load_inception(weights: Path, device: str = "cpu") -> Inception:
    """The network with weights of a local file, a plain state dict as .pth or .safetensors.

    Raises:
        UserError: where the file is missing, damaged, or holds another network's weights.
    """
    state = check_weights(weights)
    with torch.device("meta"):
        network = build()
    # A converted file may lack the counters of the batch norms, which evaluation does not need.
    counters = {name: torch.tensor(0) for name in network.state_dict() if name.endswith("num_batches_tracked")}
    network.load_state_dict({**counters, **state}, assign=True)
    return Inception(network, torch.device(device))


def check_weights(weights: Path) -> dict[str, torch.Tensor]:
    """The state dict of ``weights``, read lazily; UserError as ``load_inception`` raises."""
    if not weights.is_file():
        raise UserError(f"inception={weights} is no file; {_HINT}.")
    try:
        if weights.suffix == ".safetensors":
            state = load_file(weights)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"inception={weights} cannot be read ({str(error).splitlines()[0][:200]}); {_HINT}.") from None
    except Exception as error:  # pickle, zipfile and torch raise what they like on foreign bytes
        raise UserError(f"inception={weights} is no file of weights alone ({type(error).__name__}); {_HINT}.") from None
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in build().state_dict().items() if value.dim()}
    reason = _difference(state, expected)
    if reason:
        raise UserError(f"inception={weights} is not the FID's Inception of 2015-12-05: {reason}; {_HINT}.")
    return state


def _difference(state: Any, expected: dict[str, tuple[int, ...]]) -> str:
    """What is wrong with ``state``, "" for nothing."""
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        return "it holds something else than a state dict of tensors"
    if tuple(getattr(state.get("fc.weight"), "shape", ())) == (1000, WIDTH):
        return "it has 1000 classes where 1008 are expected, as torchvision's own network for ImageNet, whose distances are not FID"
    missing = sorted(expected.keys() - state.keys())
    if missing:
        return f"{len(missing)} of {len(expected)} tensors are missing, such as {missing[0]}"
    foreign = sorted(name for name in state.keys() - expected.keys() if not name.endswith("num_batches_tracked"))
    if foreign:
        return f"it has {len(foreign)} tensors that do not belong there, such as {foreign[0]}"
    wrong = [name for name, shape in expected.items() if tuple(state[name].shape) != shape]
    if wrong:
        return f"{wrong[0]} has the shape {list(state[wrong[0]].shape)} where {list(expected[wrong[0]])} is expected"
    if not all(bool(state[name].isfinite().all()) for name in ("fc.weight", "Conv2d_1a_3x3.conv.weight")):
        return "its weights are not finite"
    return ""
