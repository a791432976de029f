"""All models of a stage on the meta device, from the configuration alone: no weights are read or made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from paradiffusion.config import CodecConfig, ConditioningConfig, TrainConfig
from paradiffusion.errors import UserError
from paradiffusion.models.codec import Codec, find_folder
from paradiffusion.models.joint import JointModel, LossBatch, build_joint
from paradiffusion.text.encoder import DTYPES, TextEncoder, attach_lora, checkpoint_layers
from paradiffusion.text.families import empty_model, position_limit, text_width

META = torch.device("meta")

# The autoencoder of Stable Diffusion XL (its published vae/config.json): what a codec of factor 8 with 4 latent channels
# is taken for where its folder is not on this machine. The fp16-fixed one has the same shape.
SDXL_VAE: dict[str, Any] = dict(
    block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, layers_per_block=2, norm_num_groups=32, sample_size=1024,
)  # fmt: skip


class WithWholeMask(nn.Module):
    """A language model that is given its attention mask [B, 1, L, L] ready made. From a padding mask transformers would
    make it itself, and read values to do so, which a meta tensor does not have."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, attention_mask: Tensor, **inputs: Any) -> Any:
        length = attention_mask.shape[-1]
        mask = torch.ones(len(attention_mask), 1, length, length, dtype=torch.bool, device=META)
        return self.inner(attention_mask=mask, **inputs)


class EmptyTextEncoder(TextEncoder):
    """A text encoder without weights and tokenizer; its forward is the real one's."""

    def __init__(self, model: nn.Module, settings: ConditioningConfig, width: int) -> None:
        nn.Module.__init__(self)
        self.model = WithWholeMask(model)
        self.settings = settings
        self.width = width

    @property
    def inner(self) -> nn.Module:
        """The transformers model, with its adapter if any."""
        return self.model.inner


@dataclass
class EmptyModels:
    """Meta-device models of one stage; ``joint`` holds ``text`` too where its LoRA is trained. ``tokens`` is the length of the padded
    sequence that the language model reads, height and width are pixels of one image."""

    config: TrainConfig
    joint: JointModel
    text: EmptyTextEncoder
    codec: Codec
    tokens: int
    height: int
    width: int

    def batch(self, size: int, cached: bool = False) -> LossBatch:
        """One micro-batch; with ``cached`` the text features are given also where the language model is trained."""
        shape = (size, *self.codec.latent_shape(self.height, self.width))
        mask = None
        if self.config.conditioning.mask_padding:
            mask = torch.ones(size, self.tokens, dtype=torch.bool, device=META)
        common: dict[str, Any] = {
            "latents": torch.empty(shape, device=META),
            "noise": torch.empty(self.config.repeats * size, *shape[1:], device=META),
            "times": torch.empty(self.config.repeats * size, device=META),
            "weights": torch.empty(size, device=META),
            "mask": mask,
        }
        if self.joint.text_encoder is not None and not cached:
            ids = self.ids(size)
            return LossBatch(**common, ids=ids, id_mask=torch.ones_like(ids), prefix=0)
        kept = self.config.conditioning.layer_tap != "mean"  # the mean of the layers' states is made in float32
        dtype = DTYPES[self.config.text_encoder.dtype] if kept else torch.float32
        return LossBatch(**common, features=torch.empty(size, self.tokens, self.text.width, dtype=dtype, device=META))

    def ids(self, size: int) -> Tensor:
        """Token ids [size, L]."""
        return torch.zeros(size, self.tokens, dtype=torch.long, device=META)

    def read_text(self, size: int) -> Tensor:
        """The language model alone: features [size, L, D]."""
        ids = self.ids(size)
        return self.text(ids, torch.ones_like(ids))

    def encode_images(self, size: int) -> Tensor:
        """The autoencoder alone: latents of ``size`` images."""
        shape = (size, *self.codec.latent_shape(self.height, self.width))
        noise = torch.empty(shape, device=META) if self.config.codec.sample else None
        return self.codec.encode(torch.empty(size, 3, self.height, self.width, device=META), noise)


def codec_arguments(config: CodecConfig) -> dict[str, Any]:
    """The autoencoder's arguments, from its folder's config.json, else SDXL's. UserError where neither tells its shape."""
    folder = find_folder(config.path) if config.path is not None else None
    if folder is not None:
        return {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if not k.startswith("_")}
    if config.path is None and (config.factor, config.latent_channels) == (8, 4):
        return SDXL_VAE
    raise UserError(
        f"the shape of the codec {config.name} (factor {config.factor}, {config.latent_channels} channels) is not known "
        "here; set codec.path=<folder> to an AutoencoderKL in the diffusers layout, of which config.json is enough."
    )


def new_codec(config: CodecConfig, device: torch.device, source: dict[str, Any]) -> Codec:
    """A frozen autoencoder, made directly on ``device`` in its dtype. Raises UserError as ``codec_arguments``."""
    arguments = codec_arguments(config)
    with device:
        vae: Any = AutoencoderKL(**arguments)
    nn.Module.to(vae, DTYPES[config.dtype])  # diffusers' own warns of layers that should stay in fp32: there are none
    return Codec(vae.requires_grad_(False).eval(), config, source)


def empty_models(config: TrainConfig, height: int | None = None, width: int | None = None) -> EmptyModels:
    """Every model that ``config`` trains or runs, of images of the stage's resolution unless a size is given. UserError for an
    architecture that cannot be built."""
    model = empty_model(config.text_encoder).to(DTYPES[config.text_encoder.dtype]).requires_grad_(False)
    limit = min(config.conditioning.max_tokens, position_limit(model) or config.conditioning.max_tokens)
    if config.train_text != "frozen":
        holder: Any = SimpleNamespace(model=model)  # attach_lora replaces the model that it finds there
        with META:
            attach_lora(holder, config.lora)
        model = holder.model
        if config.train_text == "adapter":
            model.requires_grad_(False)
    is_trained = config.train_text == "lora"
    if is_trained and config.gradient_checkpointing:
        checkpoint_layers(model, config.gradient_checkpointing)
    text = EmptyTextEncoder(model.train(is_trained), config.conditioning, text_width(config.text_encoder))
    with META:
        joint = build_joint(config, text.width, text if is_trained else None)
    multiple = config.data.bucket_multiple
    side = max(multiple, round(config.data.resolution / multiple) * multiple)
    return EmptyModels(config, joint, text, new_codec(config.codec, META, {}), limit, height or side, width or side)
