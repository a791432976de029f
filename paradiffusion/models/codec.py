"""The KL autoencoder between images and latents, frozen in every stage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from torch import Tensor, nn

from paradiffusion.checkpoints.tensors import UNET_STEM, find_tensors, whole_files
from paradiffusion.checks import finite
from paradiffusion.config import CodecConfig
from paradiffusion.errors import UserError, reason_of
from paradiffusion.repository import ROOT
from paradiffusion.text.encoder import DTYPES
from paradiffusion.text.sources import download, same_weights, weights_hash

DIFFUSERS_SCALING_FACTOR = 0.18215  # AutoencoderKL's, where a config.json has none


class Codec(nn.Module):
    """Encodes images to latents of unit scale, and back: (z - shift) * scale, by the VAE's own statistics.

    Args:
        vae: a diffusers AutoencoderKL. Its config gives ``shift_factor``, or per-channel ``latents_mean`` and ``latents_std``,
            and ``scaling_factor`` where ``config`` has none.
        source: id, revision and hash, for the checkpoint; the scaling factor in use is added.
    """

    shift: float | Tensor  # [C, 1, 1] where it is per channel
    scale: float | Tensor

    def __init__(self, vae: Any, config: CodecConfig, source: dict[str, Any]) -> None:
        super().__init__()
        self.vae = vae
        factor = float(config.scaling_factor or vae.config["scaling_factor"] or DIFFUSERS_SCALING_FACTOR)
        self.config = replace(config, scaling_factor=factor)
        self.source = {**source, "scaling_factor": factor}
        mean, std = (vae.config.get(key) for key in ("latents_mean", "latents_std"))
        self.shift = (vae.config.get("shift_factor") or 0.0) + (0.0 if mean is None else per_channel(mean))
        self.scale = factor if std is None else factor / per_channel(std)

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents [B, C, H/f, W/f] in fp32 of images [B, 3, H, W] in -1..1.

        ``noise`` [B, C, H/f, W/f] draws from the posterior; None takes its mean. It is an argument because every draw is
        a function of the sample's identity.
        """
        return self.draw(*self.posterior(images), noise)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, before scaling and in the codec's dtype, [B, C, H/f, W/f] each."""
        posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        return posterior.mean, posterior.std

    def draw(self, mean: Tensor, std: Tensor, noise: Tensor | None) -> Tensor:
        """Latents of unit scale, fp32, from what ``posterior`` gave; without ``noise`` the mean."""
        return self.to_unit(mean if noise is None else mean + std * noise.to(mean))

    def to_unit(self, latents: Tensor) -> Tensor:
        """The VAE's own latents to ours, fp32."""
        return (latents.float() - beside(self.shift, latents)) * beside(self.scale, latents)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in -1..1, fp32, of latents [B, C, H/f, W/f]. Raises UserError where they overflow."""
        own = latents / beside(self.scale, latents) + beside(self.shift, latents)
        images = self.vae.decode(own.to(self.vae.dtype)).sample.float()
        finite(images, "the pictures that the autoencoder decodes", "codec.dtype")  # or they would be black, and be scored
        return images.clamp(-1, 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H/f, W/f) for an image of ``height`` by ``width`` pixels."""
        return self.config.latent_channels, height // self.config.factor, width // self.config.factor


def per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)


def beside(value: float | Tensor, latents: Tensor) -> float | Tensor:
    """``value`` on the device of ``latents``."""
    return value.to(latents.device) if isinstance(value, Tensor) else value


def find_folder(path: str) -> Path | None:
    """A configured folder: as given, or, for what is shipped with the repository, below its root."""
    candidates = (Path(path).expanduser(), ROOT / path)
    return next((folder for folder in candidates if (folder / "config.json").is_file()), None)


def locate_codec(config: CodecConfig) -> Path:
    """The codec's local folder, downloaded if need be; UserError when it is nowhere."""
    if config.path is not None:
        if (folder := find_folder(config.path)) is not None:
            return whole_files(folder)
        raise UserError(
            f"codec.path={config.path} holds no config.json; expected an AutoencoderKL in the diffusers layout "
            "(config.json, diffusion_pytorch_model.safetensors)."
        )
    if config.hub is not None and (found := download(config.hub, config.revision, config.subfolder)) is not None:
        return found / config.subfolder if config.subfolder else found
    fetch = f"run `python scripts/download.py what=vae id={config.hub}` where there is a network, or "
    raise UserError(
        f"the codec {config.name} was found nowhere: codec.path is not set and the hub's {config.hub or '(none configured)'} "
        f"could not be had; {fetch if config.hub else ''}set codec.path=<folder> to an AutoencoderKL in the diffusers layout."
    )


def own_scaling_factor(folder: Path) -> float | None:
    """What the autoencoder's config.json says; None where it does not."""
    found = json.loads((folder / "config.json").read_text()).get("scaling_factor")
    return None if found is None else float(found)


def settled_scaling_factor(config: CodecConfig) -> float:
    """The factor in use: the configured one, else the autoencoder's own, else diffusers' default."""
    return config.scaling_factor or own_scaling_factor(locate_codec(config)) or DIFFUSERS_SCALING_FACTOR


def load_codec(config: CodecConfig, expected_hash: str | None = None) -> Codec:
    """Load the autoencoder, frozen, in evaluation mode, on the CPU.

    Raises:
        UserError: when it is not to be had, unreadable, of another shape or scale than configured, or not the checkpoint's.
    """
    folder = locate_codec(config)
    files = find_tensors(folder, UNET_STEM)
    found = weights_hash(folder, UNET_STEM)
    if not same_weights(expected_hash, found):
        raise UserError(
            f"the codec in {folder} has the hash {found.partition('.')[0]}, but the checkpoint was trained with {expected_hash} "
            f"({config.name}); set codec.path=<folder> to that autoencoder."
        )
    try:
        # The old .bin form is unpickled by diffusers with weights_only=True; a folder may hold nothing but a variant.
        vae = AutoencoderKL.from_pretrained(
            folder,
            torch_dtype=DTYPES[config.dtype],
            use_safetensors=not files or "safetensors" in files[0].name,
            variant="fp16" if files and ".fp16" in files[0].name else None,
        )
    except (OSError, ValueError, RuntimeError, UnpicklingError, SafetensorError) as error:
        raise UserError(
            f"the codec in {folder} could not be read ({reason_of(error)}); expected an AutoencoderKL in the "
            "diffusers layout with whole weights, so fetch it again."
        ) from None
    channels = vae.config["latent_channels"]
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    if (channels, factor) != (config.latent_channels, config.factor):
        raise UserError(
            f"the codec in {folder} has {channels} latent channels and factor {factor}, but the configuration says "
            f"codec.latent_channels={config.latent_channels} and codec.factor={config.factor}; make them equal."
        )
    own = own_scaling_factor(folder)
    # A checkpoint that was trained with another one draws as it was trained.
    if expected_hash is None and None not in (own, config.scaling_factor) and own != config.scaling_factor:
        raise UserError(
            f"the codec in {folder} has the scaling_factor {own} in its config.json, and codec.scaling_factor={config.scaling_factor} "
            "says otherwise; set codec.scaling_factor=null, which takes the codec's own."
        )
    vae.requires_grad_(False)
    source = {"name": config.name, "hub": config.hub, "revision": config.revision}
    source |= {"hash": found.partition(".")[0], "known_by": found}
    return Codec(vae.eval(), config, source)
