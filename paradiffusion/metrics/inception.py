"""The Inception network of the FID, as torch-fidelity builds it: features of pictures as the score's authors took them.

That is not torchvision's network for ImageNet: it is the graph that was published on 2015-12-05 with TensorFlow, of 1008
classes, whose weights were carried over to PyTorch by the project pytorch-fid. A FID by another network is another number.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from paradiffusion.checkpoints.tensors import whole_files
from paradiffusion.errors import UserError

SIZE: Final = 299  # pixels
WIDTH: Final = 2048  # of the features: the last average pooling, "pool3"
WEIGHTS: Final = "pt_inception-2015-12-05-6726825d.pth"
PUBLISHED: Final = "6726825d"  # with what the file's SHA-256 begins, as its name says
_HINT: Final = f"get {WEIGHTS} from the releases of the project mseitzer/pytorch-fid and give its path as inception="


def prepare(image: Image.Image) -> torch.Tensor:
    """float32 [3, 299, 299] of an RGB image, in -1 to 1, as the published graph reads it.

    The resize is TensorFlow 1's bilinear one, with no half-pixel shift and no smoothing when it shrinks (pytorch-fid shifts by
    half a pixel, which moves FID in the second decimal).
    """
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)[None]  # [1, 3, H, W]
    return (interpolate_bilinear_2d_like_tensorflow1x(pixels, (SIZE, SIZE), align_corners=False)[0] - 128) / 128


class Inception:
    """The network in evaluation mode, with its weights."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        # Its own forward takes bytes of one size, and pictures of a batch have many: all layers but the one of the classes.
        self.network = nn.Sequential(*list(network.children())[:-1], nn.Flatten()).to(device)
        self.device = device

    @torch.inference_mode()
    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """float32 [B, 2048], on the CPU, of ``pixels`` [B, 3, 299, 299] from ``prepare``."""
        # TF32, cuDNN's default on GPUs, would leave three digits of a feature.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            features: torch.Tensor = self.network(pixels.to(self.device)).float().cpu()
        return features


def load_inception(weights: Path, device: str = "cpu") -> Inception:
    """The network with weights of a local file, a plain state dict as .pth or .safetensors. UserError where the file is missing, damaged,
    or holds another network's weights."""
    state = _read(weights)
    try:
        if state["fc.weight"].shape[0] == 1000:
            raise ValueError("it has 1000 classes where 1008 are expected, as torchvision's network, whose distances are not FID")
        if not all(bool(state[name].isfinite().all()) for name in ("fc.weight", "Conv2d_1a_3x3.conv.weight")):
            raise ValueError("its weights are not finite")
        # torch-fidelity unpickles a file with all that it may call, and draws weights before: it gets the names and shapes.
        shapes = io.BytesIO()
        torch.save({name: value.to("meta") for name, value in state.items()}, shapes)
        shapes.seek(0)
        with torch.device("meta"):
            network = FeatureExtractorInceptionV3("inception-v3-compat", [str(WIDTH)], shapes)
        network.load_state_dict(state, assign=True)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        lines = str(error).splitlines()  # of PyTorch's, the first names the class
        reason = " ".join(lines[min(1, len(lines) - 1)].split())[:200].rstrip(" .")
        reason = f"it has no {error}" if isinstance(error, KeyError) else reason
        raise UserError(f"inception={weights} is not the FID's Inception of 2015-12-05: {reason}; {_HINT}.") from None
    return Inception(network.eval().requires_grad_(False).float(), torch.device(device))


def _read(weights: Path) -> Any:
    """What ``weights`` holds, read lazily; nothing in it is executed."""
    if not weights.is_file():
        raise UserError(f"inception={weights} is no file; {_HINT}.")
    whole_files(weights)
    try:
        if weights.suffix == ".safetensors":
            return load_file(weights)
        return torch.load(weights, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"inception={weights} cannot be read ({str(error).splitlines()[0][:200]}); {_HINT}.") from None
    except Exception as error:  # pickle, zipfile and torch raise what they like on foreign bytes
        raise UserError(f"inception={weights} is no file of weights alone ({type(error).__name__}); {_HINT}.") from None
