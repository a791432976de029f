"""The schema of what a checkpoint records: text encoder, conditioning, adapter, U-Net, codec, objective and sampler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from paradiffusion.checks import choice, fraction, positive
from paradiffusion.errors import UserError

PREDICTIONS = ("epsilon", "v_prediction", "flow")
DENSITIES = ("uniform", "logit_normal")
SOLVERS = ("dpm", "ddim", "euler")


@dataclass
class TextEncoderConfig:
    """A language model that reads prompts.

    Attributes:
        name: what people call it; the checkpoint records it.
        path: a local folder with config, tokenizer and safetensors; the first place looked at.
        package: a Python package that carries the model as one GGUF file; the second place.
        hub: a model id on the hub, with ``revision``; the third place.
        layers: run only the first layers (None for all): early layers already hold what colour and place words mean,
            and a quarter of the layers is four times as fast.
        dtype: of its frozen weights: "float32", "bfloat16" or "float16".
        quantization: "4bit" keeps the frozen linear layers in NF4 (bitsandbytes, GPU only), under LoRA too; None for none.
        architecture: arguments of its transformers configuration, ``model_type`` first among them; from these alone
            scripts/describe.py counts parameters, memory and compute without the weights.
    """

    name: str = "tiny"
    path: str | None = None
    package: str | None = None
    hub: str | None = None
    revision: str | None = None
    layers: int | None = None
    dtype: str = "float32"
    quantization: str | None = None
    architecture: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        choice("text_encoder.dtype", self.dtype, ("float32", "bfloat16", "float16"))
        if self.quantization is not None:
            choice("text_encoder.quantization", self.quantization, ("4bit",))
        if self.layers is not None:
            positive("text_encoder.layers", self.layers)


@dataclass
class ConditioningConfig:
    """How text becomes conditioning. A checkpoint records it whole; stages of one run must agree on it.

    Attributes:
        layer_tap: "last" hidden state (the paper), or "mean" of all layers' layer-normalised states (arXiv 2506.08210).
        projection: "linear" (the paper: the U-Net's own encoder_hid_proj) or "refiner": a small bidirectional transformer
            before it (LI-DiT, arXiv 2406.11831).
        refiner_width, refiner_layers, refiner_heads: its shape.
        refiner_kernel: tokens that the convolution in each of its blocks spans (odd; 0 for no convolution).
        layout_patch: latents along each side of the square that each query of the layout head estimates from the refined text
            (models/layout.py); the U-Net takes the estimate as further input channels. 0 for no such head (the paper).
        layout_layers: blocks of the layout head.
        layout_reads: what it reads of the refined text: its "tokens", or their "mean" alone (for an ablation: the mean does
            not hold which word belongs to which place).
        prefix: an instruction put before each prompt; its own tokens are not given to the denoiser.
        mask_padding: False: padding is attended to and always goes to ``max_tokens`` (the paper); True: masked.
        pad_multiple: a masked batch is padded to its longest caption, rounded up to a multiple of this many tokens: 8 is what
            tensor cores are aligned to; more makes fewer shapes, for compile=true, and more padding (docs/data.md).
        max_tokens: longer prompts are cut, and counted. A stage may set its own (256 / 512 / 512 in the paper).
    """

    name: str = "paper"
    layer_tap: str = "last"
    projection: str = "linear"
    refiner_width: int = 256
    refiner_layers: int = 2
    refiner_heads: int = 4
    refiner_kernel: int = 0
    layout_patch: int = 0
    layout_layers: int = 2
    layout_reads: str = "tokens"
    prefix: str = ""
    mask_padding: bool = False
    pad_multiple: int = 8
    max_tokens: int = 256

    def check(self) -> None:
        choice("conditioning.layer_tap", self.layer_tap, ("last", "mean"))
        choice("conditioning.projection", self.projection, ("linear", "refiner"))
        positive("conditioning.max_tokens", self.max_tokens)
        positive("conditioning.pad_multiple", self.pad_multiple)
        positive("conditioning.layout_patch", self.layout_patch, zero=True)
        positive("conditioning.layout_layers", self.layout_layers)
        choice("conditioning.layout_reads", self.layout_reads, ("tokens", "mean"))
        if self.layout_patch and self.projection != "refiner":
            raise UserError(
                "conditioning.layout_patch needs the refiner's tokens; set conditioning.projection=refiner, or 0."
            )
        if self.projection == "refiner":
            positive("conditioning.refiner_layers", self.refiner_layers)
            if self.refiner_kernel < 0 or (self.refiner_kernel and self.refiner_kernel % 2 == 0):
                raise UserError(f"conditioning.refiner_kernel={self.refiner_kernel} must be odd, or 0 for none.")
            if self.refiner_heads < 1 or self.refiner_width % (2 * self.refiner_heads):
                raise UserError(
                    f"conditioning.refiner_width={self.refiner_width} must be a multiple of twice "
                    f"conditioning.refiner_heads={self.refiner_heads}, since the heads use rotary positions."
                )


@dataclass
class LoraConfig:
    """Low-rank adaptation of the text encoder (stage 2), through PEFT."""

    rank: int = 8
    alpha: int = 8
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])

    def check(self) -> None:
        positive("lora.rank", self.rank)
        if not self.target_modules:
            raise UserError("lora.target_modules is empty; name at least one linear layer, such as [q_proj,v_proj].")


@dataclass
class UNetConfig:
    """The denoiser: arguments of diffusers' UNet2DConditionModel.

    Attributes:
        arguments: passed on as they are; in/out channels, text width and projection come from codec and conditioning.
        coordinates: tell the U-Net where each latent lies, so that place words have something to bind to: 0 for not at
            all (the paper; the official layout takes nothing else), 1 for two input channels with x and y in -1..1, n
            for those and n - 1 octaves of their sines and cosines (4 more channels each).
        plain_attention: use matrix products and a softmax instead of torch's fused attention. On processors, at a few
            dozen latents, its backward pass is a quarter faster; on GPUs leave it off.
        lora_rank: train a LoRA adapter of this rank on the U-Net's attention instead of all its weights; 0 for none. The
            text projection (and refiner) are trained whole in either case.
        lora_alpha, lora_target_modules: of that adapter.
    """

    name: str = "nano"
    arguments: dict[str, Any] = field(default_factory=dict)
    coordinates: int = 0
    plain_attention: bool = False
    lora_rank: int = 0
    lora_alpha: int = 16
    lora_target_modules: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])

    def check(self) -> None:
        positive("unet.lora_rank", self.lora_rank, zero=True)
        positive("unet.lora_alpha", self.lora_alpha)


@dataclass
class CodecConfig:
    """The KL autoencoder, frozen in every stage.

    Attributes:
        path: a local diffusers folder; ``hub`` with ``revision`` and ``subfolder`` is the second place looked at.
        factor: pixels per latent along each side.
        scaling_factor: multiplies latents so that their standard deviation is about 1; None for the autoencoder's own, from
            its config.json, where a shift and per-channel statistics are read too. Another one than its own is refused.
        sample: draw latents from the posterior (as diffusers' trainers do), rather than take its mean.
    """

    name: str = "nano"
    path: str | None = None
    hub: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    factor: int = 8
    latent_channels: int = 4
    scaling_factor: float | None = None
    dtype: str = "float32"
    sample: bool = True

    def check(self) -> None:
        choice("codec.dtype", self.dtype, ("float32", "bfloat16", "float16"))
        for key in ("factor", "latent_channels", "scaling_factor"):
            if (value := getattr(self, key)) is not None:
                positive(f"codec.{key}", value)


@dataclass
class ObjectiveConfig:
    """What the denoiser is trained to predict, and at which noise levels.

    Attributes:
        prediction: "epsilon" (Ho et al. 2020), "v_prediction" (Salimans & Ho 2022) or "flow" (rectified flow, 2403.03206).
        beta_schedule, beta_start, beta_end, train_timesteps: the variance-preserving schedule; unused by "flow".
        zero_terminal_snr: rescale the schedule so that the last step is pure noise (arXiv 2305.08891, algorithm 1).
        density: how timesteps are drawn: "uniform", or "logit_normal" (arXiv 2403.03206, section 3.1).
        logit_mean, logit_std: of the logit-normal density; a positive mean favours high noise.
        min_snr_gamma: clip of the min-SNR loss weight (arXiv 2303.09556), or None for none.
        flow_shift: shift of the flow's sampling times towards high noise for large images (2403.03206, eq. 23).
        layout_weight: of the layout head's squared error beside the diffusion loss.
    """

    name: str = "paper"
    prediction: str = "epsilon"
    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    train_timesteps: int = 1000
    zero_terminal_snr: bool = False
    density: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    min_snr_gamma: float | None = None
    flow_shift: float = 1.0
    layout_weight: float = 3.0

    def check(self) -> None:
        choice("objective.prediction", self.prediction, PREDICTIONS)
        choice("objective.density", self.density, DENSITIES)
        choice("objective.beta_schedule", self.beta_schedule, ("scaled_linear", "linear", "squaredcos_cap_v2"))
        positive("objective.train_timesteps", self.train_timesteps)
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError(
                f"objective.beta_start={self.beta_start} and objective.beta_end={self.beta_end} must lie between 0 and 1, start first."
            )
        positive("objective.logit_std", self.logit_std)
        positive("objective.flow_shift", self.flow_shift)
        positive("objective.layout_weight", self.layout_weight, zero=True)
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise UserError(
                "objective.zero_terminal_snr=true cannot be trained with objective.prediction=epsilon, since at pure noise "
                "the target says nothing about the image; use objective.prediction=v_prediction."
            )
        if self.min_snr_gamma is not None and self.zero_terminal_snr:
            raise UserError(
                f"objective.min_snr_gamma={self.min_snr_gamma} gives no weight to the noise at which sampling begins where "
                "objective.zero_terminal_snr=true; leave one of them out."
            )
        if self.min_snr_gamma is not None and (self.prediction == "flow" or self.min_snr_gamma <= 0):
            raise UserError(
                f"objective.min_snr_gamma={self.min_snr_gamma} needs a positive number and objective.prediction=epsilon or "
                f"v_prediction (found {self.prediction}); set objective.min_snr_gamma=null."
            )


@dataclass
class SamplerConfig:
    """How images are drawn, and how much the prompt is amplified.

    Attributes:
        solver: "dpm" (DPM-Solver++ multistep), "ddim" or "euler".
        guidance: scale w of null + w (prompt - null) (Ho & Salimans 2022); 1 runs no null prompt at all.
        guidance_rescale: share of the guided prediction brought back to the prompt's standard deviation (2305.08891, eq. 16).
        guidance_start, guidance_stop: guide only while the share of steps done lies between them (arXiv 2404.07724).
    """

    solver: str = "dpm"
    steps: int = 100
    guidance: float = 7.5
    guidance_rescale: float = 0.0
    guidance_start: float = 0.0
    guidance_stop: float = 1.0

    def check(self) -> None:
        choice("sampler.solver", self.solver, SOLVERS)
        positive("steps", self.steps)
        if not 0 <= self.guidance <= 100:
            raise UserError(f"guidance={self.guidance} is out of range; expected 0 to 100, 1 for none.")
        fraction("guidance_rescale", self.guidance_rescale)
        if not 0 <= self.guidance_start <= self.guidance_stop <= 1:
            raise UserError(
                f"guidance_start={self.guidance_start} and guidance_stop={self.guidance_stop} must lie within 0 to 1, start first."
            )
