"""The denoiser: a class of diffusers, UNet2DConditionModel or another of ``DENOISERS``, built from the configuration."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from paradiffusion.config import CodecConfig, ConditioningConfig, UNetConfig
from paradiffusion.errors import UserError, reason_of
from paradiffusion.text.conditioning import pad_length
from paradiffusion.text.encoder import check_targets, is_adapter, peft_config


@dataclass(frozen=True)
class Denoiser:
    """What is to be known of a class besides its arguments, where forward takes (sample, timestep=, encoder_hidden_states=,
    encoder_attention_mask=); one that takes others needs a few lines in ``JointModel.denoise``, too.

    Attributes:
        made: the class.
        folder: where a checkpoint holds it, as diffusers' own pipelines call it.
        text_width: the argument that is the width of the features that its text projection takes; None for no projection.
        projection, first: its modules that project the text, and that take the latents.
        divisor: by its configuration, what the sides of its latents must be multiples of in training.
        fixed: arguments that nobody chooses.
    """

    made: Any
    folder: str
    text_width: str
    projection: str
    first: str
    divisor: Callable[[Any], int]
    fixed: dict[str, Any] = field(default_factory=dict)


DENOISERS = {
    "UNet2DConditionModel": Denoiser(
        UNet2DConditionModel, "unet", "encoder_hid_dim", "encoder_hid_proj", "conv_in",
        lambda config: 2 ** (len(config["block_out_channels"]) - 1),
    ),
    "PixArtTransformer2DModel": Denoiser(  # arXiv 2310.00426; without its conditions on size and aspect ratio
        PixArtTransformer2DModel, "transformer", "caption_channels", "caption_projection", "pos_embed.proj",
        lambda config: config["patch_size"], {"use_additional_conditions": False},
    ),
}  # fmt: skip
# Arguments that codec and conditioning decide, or that may differ between stages; dropout is none here, whatever weights had.
DECIDED = {"sample_size", "in_channels", "out_channels", "encoder_hid_dim", "encoder_hid_dim_type", "caption_channels",
           "use_additional_conditions", "time_cond_proj_dim", "dropout"}  # fmt: skip
# The layer that takes the embedding of a guidance scale, where one is distilled, and its width, that of latent consistency models.
SCALE_LAYER, SCALE_WIDTH = "time_embedding.cond_proj", 256
# Names of the text projections' parameters within the joint module.
PROJECTIONS = tuple(f"unet.{kind.projection}." for kind in DENOISERS.values())


def class_of(config: dict[str, Any]) -> str:
    """The class that a stored configuration is of. Raises UserError for one that is not known here."""
    name = str(config.get("_class_name", "UNet2DConditionModel"))
    if name not in DENOISERS:
        raise UserError(f"the denoiser is a {name}, which is not known here; expected one of {', '.join(DENOISERS)}.")
    return name


def kind_of(model: Any) -> Denoiser:
    """What is known of a model's class; ``model`` may be wrapped by torch.compile."""
    return DENOISERS[type(getattr(model, "_orig_mod", model)).__name__]


def read_width(config: dict[str, Any]) -> int:
    """Width of the text features that a denoiser of this stored configuration reads."""
    width = config.get(DENOISERS[class_of(config)].text_width) or config.get("cross_attention_dim") or 0
    return max(width) if isinstance(width, (list, tuple)) else width


def text_width(conditioning: ConditioningConfig, encoder_width: int) -> int:
    """Width of the features that reach the U-Net's own linear projection."""
    return conditioning.refiner_width if conditioning.projection == "refiner" else encoder_width


def layout_arguments(conditioning: ConditioningConfig, latent_channels: int) -> dict[str, Any] | None:
    """The refiner's argument ``layout``: the layout head's shape, None for none."""
    if not conditioning.layout_patch:
        return None
    return {
        "layers": conditioning.layout_layers,
        "patch": conditioning.layout_patch,
        "channels": latent_channels,
        "reads": conditioning.layout_reads,
    }


def unet_arguments(config: UNetConfig, codec: CodecConfig, conditioning: ConditioningConfig, encoder_width: int) -> dict[str, Any]:
    """All arguments of the denoiser: the configured ones, and those that codec and conditioning decide.

    A configured ``encoder_hid_dim`` (or what its class calls it) of None makes one without a text projection, for weights that
    have none.
    """
    kind = DENOISERS[config.class_name]
    projected = config.arguments.get(kind.text_width, encoder_width) is not None
    return {
        **config.arguments,
        **kind.fixed,
        "in_channels": codec.latent_channels
        + coordinate_channels(config.coordinates)
        + codec.latent_channels * bool(conditioning.layout_patch),
        "out_channels": codec.latent_channels,
        kind.text_width: text_width(conditioning, encoder_width) if projected else None,
    }


def own_arguments(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """Of a denoiser's stored configuration or of ``unet.arguments``, what decides its shape and is not the default of the class
    called ``name``, and neither codec nor conditioning decides; as JSON has it."""
    signature = inspect.signature(DENOISERS[name].made).parameters
    defaults = json.loads(json.dumps({key: parameter.default for key, parameter in signature.items()}))
    own = json.loads(json.dumps({key: arguments[key] for key in arguments.keys() & defaults.keys() - DECIDED}))
    return {key: value for key, value in own.items() if value != defaults[key]}


def empty_unet(config: UNetConfig, codec: CodecConfig, conditioning: ConditioningConfig, encoder_width: int) -> Any:
    """The denoiser on the meta device: shapes and parameter counts at no cost. Raises UserError as ``build_unet``."""
    with torch.device("meta"):
        return build_unet(replace(config, plain_attention=False), codec, conditioning, encoder_width, 0)


def build_unet(
    config: UNetConfig, codec: CodecConfig, conditioning: ConditioningConfig, encoder_width: int, seed: int, scaled: bool = False
) -> Any:
    """A denoiser with fresh weights, a function of ``seed``; a U-Net's ``encoder_hid_proj`` is the paper's linear layer.

    Args:
        scaled: it is given a guidance scale, which changes nothing before it is trained.
    Raises:
        UserError: when diffusers refuses the arguments.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            arguments = unet_arguments(config, codec, conditioning, encoder_width)
            unet = DENOISERS[config.class_name].made(**arguments, **({"time_cond_proj_dim": SCALE_WIDTH} if scaled else {}))
        except (TypeError, ValueError, RuntimeError, NotImplementedError, AssertionError) as error:
            raise UserError(
                f"unet.arguments do not make a {config.class_name} ({reason_of(error)}); see configs/unet/ for sets that do."
            ) from None
    if scaled:
        nn.init.zeros_(unet.get_submodule(SCALE_LAYER).weight)
    if config.plain_attention:
        plain = {
            name: AttnProcessor() if isinstance(processor, AttnProcessor2_0) else processor
            for name, processor in unet.attn_processors.items()
        }  # SimpleCrossAttn blocks have processors of their own kind, which stay
        unet.set_attn_processor(plain)
    return unet


def embed_scales(scales: Tensor) -> Tensor:
    """Guidance scales [B] as diffusers' pipelines embed them for ``timestep_cond``, [B, SCALE_WIDTH] (arXiv 2310.04378, section 4.3)."""
    return get_timestep_embedding(1000 * (scales - 1), SCALE_WIDTH)


def add_lora(unet: Any, config: UNetConfig, seed: int) -> None:
    """Train a LoRA adapter (arXiv 2106.09685) on the U-Net's attention instead of its weights, if ``lora_rank`` is not 0.

    What a pre-trained U-Net cannot have learned is trained whole: the text projection, and the first convolution where it
    reads more than latents. The adapter is fp32, without dropout, and a function of ``seed``; adapted layers are named
    ``...base_layer.weight`` and ``...lora_A.default.weight``.

    Raises:
        UserError: when no linear layer has a configured name.
    """
    if not config.lora_rank:
        return
    from peft import inject_adapter_in_model

    check_targets(unet, list(config.lora_target_modules), "unet.lora_target_modules", "U-Net")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(peft_config(config.adapter), unet)
    whole = trained_whole(kind_of(unet), unet.config)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(is_adapter(name) or name.startswith(whole))


def trained_whole(kind: Denoiser, config: dict[str, Any]) -> tuple[str, ...]:
    """How the names of a denoiser's parameters begin that are trained whole beside its adapter."""
    first = config["in_channels"] != config["out_channels"]
    return (f"{kind.projection}.", f"{SCALE_LAYER}.", *([f"{kind.first}."] if first else []))


def halve_frozen(unet: Any) -> None:
    """Keep the frozen matrices in bfloat16, to which autocast would round them in every use; norms and biases stay in fp32."""
    for module in unet.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not module.weight.requires_grad:
            module.weight.data = module.weight.data.to(torch.bfloat16)


def lora_names(state: dict[str, Tensor], unet: Any) -> dict[str, Tensor]:
    """A joint module's ``state`` with a plain U-Net's weights under the names that they have within ``add_lora``'s U-Net.

    So a checkpoint that was trained whole can start a run with an adapter. Names that fit already stay.
    """
    adapted = {f"unet.{name.removesuffix('.base_layer')}" for name, _ in unet.named_modules() if name.endswith(".base_layer")}
    named = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        named[f"{module}.base_layer.{kind}" if module in adapted else name] = tensor
    return named


def downsampling(unet: Any) -> int:
    """By how much the denoiser shrinks its latents inside: sides must be multiples of this."""
    return kind_of(unet).divisor(unet.config)


def drawn_multiple(unet: Any) -> int:
    """What the sides of latents that are drawn must be multiples of. Ordinary upsampling blocks are told the size that they must
    come to; those of the paper's U-Net (SimpleCrossAttn, ResnetUpsample) double what they get, whatever it was before."""
    ordinary = set(unet.config.get("up_block_types", ["none"])) <= {"CrossAttnUpBlock2D", "UpBlock2D"}
    return 1 if ordinary else downsampling(unet)


def coordinate_channels(octaves: int) -> int:
    """How many channels ``with_coordinates`` adds."""
    return 2 + 4 * (octaves - 1) if octaves else 0


def with_coordinates(latents: Tensor, octaves: int) -> Tensor:
    """Append where each latent lies: [B, C, h, w] to [B, C + n, h, w], n as ``coordinate_channels`` says.

    x and y of the latents' centres in -1..1, then sin and cos of k pi x and k pi y for k = 1 .. octaves - 1.
    Convolutions alone know places only through the zeros at the borders.
    """
    if not octaves:
        return latents
    b, _, h, w = latents.shape
    # In fp32, and then rounded, as under autocast in training: in bf16 neighbours would share a place.
    y = ((torch.arange(h, device=latents.device, dtype=torch.float32) + 0.5) / h * 2 - 1).view(h, 1).expand(h, w)
    x = ((torch.arange(w, device=latents.device, dtype=torch.float32) + 0.5) / w * 2 - 1).view(1, w).expand(h, w)
    channels = [x, y]
    for k in range(1, octaves):
        channels += [wave(math.pi * k * axis) for axis in (x, y) for wave in (torch.sin, torch.cos)]
    return torch.cat([latents, torch.stack(channels).expand(b, -1, h, w).to(latents.dtype)], dim=1)


def with_positions(layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """A forward pre-hook: the text [B, L, D] plus the sines and cosines of each token's position (Vaswani et al. 2017, section 3.5)."""
    text = inputs[0]
    # In fp32, and then rounded: bf16 has no odd positions above 256.
    position, pair = (torch.arange(n, device=text.device, dtype=torch.float32) for n in (text.shape[1], text.shape[2] // 2))
    angles = position[:, None] * 1e4 ** (-2 * pair / text.shape[2])  # [L, D/2]
    return text + torch.cat([angles.sin(), angles.cos()], dim=1).to(text.dtype)


def number_keys(unet: Any) -> None:
    """Have each key layer that reads the text see where its tokens stand (conditioning.key_positions); once, however often called.

    The layers, not the attention processors, are told, so that it holds for any of these, and for the paper's kind of block, whose
    text has key layers of its own beside the image's. An adapter must be there before. Raises UserError where no layer reads the text.
    """
    blocks = [module for module in unet.modules() if isinstance(module, Attention)]
    layers: list[Any] = [one.to_k if one.add_k_proj is None else one.add_k_proj for one in blocks if one.is_cross_attention]
    if not layers:
        raise UserError("conditioning.key_positions=true needs a denoiser with cross-attention, and unet.arguments make none.")
    for layer in layers:
        if with_positions not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(with_positions)


def apart_from_image(unet: Any, features: Tensor, mask: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """``features`` [B, L, D] and ``mask`` [B, L], padded by masked tokens where L is the number of the image's tokens at some
    level of ``height`` x ``width`` latents.

    The paper's kind of block reads text and image in one attention. diffusers extends the text's mask over the image
    (``prepare_attention_mask``) only where the two differ in length; where they are equal, the attention fails.
    """
    kinds = [unet.config.get(key) for key in ("down_block_types", "mid_block_type", "up_block_types")]
    if "SimpleCrossAttn" not in str(kinds):
        return features, mask
    tokens = set()
    for _ in unet.config["down_block_types"]:
        tokens.add(height * width)
        height, width = -(-height // 2), -(-width // 2)
    length = mask.shape[1]
    while length in tokens:
        length += 8
    return pad_length(features, length), pad_length(mask, length)
