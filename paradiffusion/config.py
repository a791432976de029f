"""The schema: what can be configured, what is known of each key, and what goes together.

``compose.py`` fills these dataclasses from ``configs/`` and the command line; every other room takes its part of them as an
argument. A checkpoint records text encoder, conditioning, adapter, U-Net, codec, objective and sampler. A check here runs
before any model is loaded.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Any, NamedTuple

from paradiffusion.checks import Check, below_one, choice, fraction, not_negative, on_disk, one_of, positive
from paradiffusion.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")
PREDICTIONS = ("epsilon", "v_prediction", "flow")
SOLVERS = ("dpm", "ddim", "euler")
DENOISERS = ("UNet2DConditionModel", "PixArtTransformer2DModel")
WORLDS = ("small", "large")  # of the built-in scenes


class OptimizerKind(NamedTuple):
    """Where an optimiser's class is, in an extra package or in torch, and how many bytes its state has for a parameter, at most."""

    path: str
    state: int


OPTIMIZERS = {
    **{
        made.lower(): OptimizerKind(f"torch.optim.{made}", state)
        for made, state in (
            ("AdamW", 8), ("Adam", 8), ("Adamax", 8), ("NAdam", 8), ("RAdam", 8), ("Adadelta", 8), ("Adagrad", 4),
            ("Adafactor", 4), ("RMSprop", 8), ("Rprop", 8), ("SGD", 4), ("ASGD", 4), ("Muon", 8),
        )
    },
    "adamw8bit": OptimizerKind("bitsandbytes.optim.AdamW8bit", 2),
    "adamw8bit_torchao": OptimizerKind("torchao.optim.AdamW8bit", 2),
    "adamw4bit_torchao": OptimizerKind("torchao.optim.AdamW4bit", 1),
    "prodigy": OptimizerKind("prodigyopt.Prodigy", 16),
    "adamw_schedulefree": OptimizerKind("schedulefree.AdamWScheduleFree", 8),
    "radam_schedulefree": OptimizerKind("schedulefree.RAdamScheduleFree", 8),
    "sgd_schedulefree": OptimizerKind("schedulefree.SGDScheduleFree", 4),
}  # fmt: skip


# Kinds of adapter: PEFT's configuration, and what makes of it this kind (PiSSA starts otherwise: text/encoder.py).
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {}), "dora": ("LoraConfig", {"use_dora": True}), "rslora": ("LoraConfig", {"use_rslora": True}),
    "pissa": ("LoraConfig", {}), "lokr": ("LoKrConfig", {}), "loha": ("LoHaConfig", {}),
}  # fmt: skip


def option(default: Any, *, typed: str = "", free: str = "", of: str = "", accepts: Check | None = None) -> Any:
    """A field with what else must be known of its key. No other list says it.

    Args:
        default: the value, or what makes it (list, dict, a dataclass).
        typed: reaches the configuration as typed, whatever Hydra's grammar makes of its characters: a "path" (quotes around
            it come off), as every text is by default; "paths", the same or a list; "text", to the letter; or "yaml".
        free: why a resumed run may have another value. "always": nothing that is trained depends on it. "resume": it says how
            the run goes on, or where a model lies whose hash is compared. "data": where the data lies whose fingerprint is.
        of: what is a function of it, by spaces: "latents" and "text" features, as caches hold them; "weights", of which a
            stage starts only from those that were trained with the same; "noise", the same of the U-Net by itself.
        accepts: raises UserError for a value that makes no sense (paradiffusion/checks.py); None is one where it is the default.
    """
    metadata = {"typed": typed, "free": free, "of": of.split(), "accepts": accepts}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def keys_of(cls: Any, prefix: str = "", free: str = "") -> dict[str, dict[str, Any]]:
    """All keys of a schema, dotted, with what ``option`` says of each; ``free`` holds for a group's keys, too.

    "open" are dictionaries, which take keys of the user's own. Fields that no user gives are left out
    (``metadata={"internal": True}``).
    """
    keys: dict[str, dict[str, Any]] = {}
    for one in fields(cls):
        if one.metadata.get("internal"):
            continue
        default = one.default_factory() if callable(one.default_factory) else one.default
        known = {"of": [], **one.metadata, "free": one.metadata.get("free") or free}
        typed = known.get("typed") or ("path" if one.type in ("str", "str | None") else "")  # 1e45678 may be a revision
        keys[prefix + one.name] = {**known, "typed": typed, "open": isinstance(default, dict)}
        if is_dataclass(default):
            keys |= keys_of(type(default), f"{prefix}{one.name}.", known["free"])
    return keys


def values_of(config: Any) -> dict[str, Any]:
    """The values of all dotted keys that are no groups."""
    values = {key: attrgetter(key)(config) for key in keys_of(type(config))}
    return {key: value for key, value in values.items() if not is_dataclass(value)}


def identity(config: Any, of: str) -> dict[str, Any]:
    """Of ``config`` what ``of`` ("latents", "text", "weights" or "noise") is a function of."""
    keys = keys_of(type(config))
    return {key: value for key, value in values_of(config).items() if of in keys[key]["of"]}


def check_values(config: Any, prefix: str = "") -> None:
    """Raise UserError for the first value that its field does not accept, in the groups of ``config`` too."""
    for one in fields(config):
        value, accepts = getattr(config, one.name), one.metadata.get("accepts")
        if is_dataclass(value):
            check_values(value, f"{prefix}{one.name}.")
        elif accepts is not None and value is not None:
            accepts(prefix + one.name, value)


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
        quantization: "4bit" keeps the frozen linear layers in NF4 (bitsandbytes), under LoRA too; "fp8" keeps them whole and multiplies
            them in 8 bits (torchao; with compile=true, or the gradients of frozen weights would be made too). Both need a GPU.
        architecture: arguments of its transformers configuration, ``model_type`` first among them; from these alone
            scripts/describe.py counts parameters, memory and compute without the weights.
    """

    name: str = option("tiny", of="weights")
    path: str | None = option(None, free="resume")
    package: str | None = option(None, free="resume")
    hub: str | None = option(None, free="resume")
    revision: str | None = option(None, free="resume")
    layers: int | None = option(None, of="text weights", accepts=positive)
    dtype: str = option("float32", of="text", accepts=one_of(*DTYPES))
    quantization: str | None = option(None, of="text", accepts=one_of("4bit", "fp8"))
    architecture: dict[str, Any] = option(dict, free="resume")


@dataclass
class ConditioningConfig:
    """How text becomes conditioning. A checkpoint records it whole; stages of one run must agree on it.

    Attributes:
        layer_tap: "last" hidden state (the paper), or "mean" of all layers' layer-normalised states (arXiv 2506.08210).
        projection: "linear" (the paper: the U-Net's own encoder_hid_proj) or "refiner": a small bidirectional transformer
            before it (LI-DiT, arXiv 2406.11831).
        refiner_width, refiner_layers, refiner_heads: its shape; of width and heads null is settled in ``compose.py``, by the denoiser.
        refiner_kernel: tokens that the convolution in each of its blocks spans (odd; 0 for no convolution).
        refiner_reach: tokens over which attention falls off in the last but one of each four of its heads, half as many in each before;
            the last sees all alike. 0: all heads do.
        layout_patch: latents along each side of the square that each query of the layout head estimates from the refined text
            (models/layout.py); the U-Net takes the estimate as further input channels. 0 for no such head (the paper).
        layout_layers: blocks of the layout head.
        layout_reads: what it reads of the refined text: its "tokens", or their "mean" alone (for an ablation: the mean does
            not hold which word belongs to which place).
        key_positions: add each token's position to what the keys of the denoiser's cross-attention are made of, and not to what the
            values are (TENOR in CoMPaSS, arXiv 2412.13195). No parameters; its weights alone, read by diffusers, lack it.
        scores: how many bins of each score, a number of the samples' JSON, the refined text is told by a token before it (text/scores.py).
            Their edges are quantiles of what the first samples have, and belong to the weights. Empty for none.
        prefix: an instruction put before each prompt; its own tokens are not given to the denoiser.
        mask_padding: False: padding is attended to and always goes to ``max_tokens`` (the paper); True: masked.
        pad_multiple: a masked batch is padded to its longest caption, rounded up to a multiple of this many tokens: 8 is what
            tensor cores are aligned to; more makes fewer shapes, for compile=true, and more padding (docs/scale.md).
        max_tokens: longer prompts are cut, and counted. A stage may set its own (256 / 512 / 512 in the paper).
        clean_text: prompts are read as captions of training are (data/captions.py: one line, single spaces, composed accents, no
            invisible characters). False: to the letter, as the released code reads them.
    """

    name: str = "paper"
    layer_tap: str = option("last", of="text weights", accepts=one_of("last", "mean"))
    projection: str = option("linear", of="weights", accepts=one_of("linear", "refiner"))
    refiner_width: int = option(256, of="weights")
    refiner_layers: int = option(2, of="weights")
    refiner_heads: int = option(4, of="weights")
    refiner_kernel: int = option(0, of="weights")
    refiner_reach: float = option(0.0, of="weights", accepts=not_negative)
    layout_patch: int = option(0, of="weights", accepts=not_negative)
    layout_layers: int = option(2, of="weights", accepts=positive)
    layout_reads: str = option("tokens", of="weights", accepts=one_of("tokens", "mean"))
    key_positions: bool = option(False, of="weights")
    scores: dict[str, int] = option(dict, of="weights")
    prefix: str = option("", of="text weights")
    mask_padding: bool = option(False, of="text weights")
    pad_multiple: int = option(8, free="always", accepts=positive)
    max_tokens: int = option(256, of="text", accepts=positive)
    clean_text: bool = option(True, free="always")

    def check(self) -> None:
        if self.layout_patch and self.projection != "refiner":
            raise UserError("conditioning.layout_patch needs the refiner's tokens; set conditioning.projection=refiner, or 0.")
        if self.scores and (self.projection != "refiner" or min(self.scores.values()) < 2):
            raise UserError(
                f"conditioning.scores={self.scores} must give each score two bins or more, and needs the refiner's tokens "
                "(conditioning.projection=refiner)."
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
    """Low-rank adaptation of the text encoder (stage 2), through PEFT; ``kind`` is one of ADAPTERS."""

    rank: int = option(8, accepts=positive)
    alpha: int = 8
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    kind: str = option("lora", accepts=one_of(*ADAPTERS))

    def check(self) -> None:
        if not self.target_modules:
            raise UserError("lora.target_modules is empty; name at least one linear layer, such as [q_proj,v_proj].")


@dataclass
class UNetConfig:
    """The denoiser.

    Attributes:
        class_name: its class in diffusers, one of DENOISERS.
        arguments: passed on as they are; in/out channels, text width and projection come from codec and conditioning.
        coordinates: tell the U-Net where each latent lies, so that place words have something to bind to: 0 for not at
            all (the paper; the official layout takes nothing else), 1 for two input channels with x and y in -1..1, n
            for those and n - 1 octaves of their sines and cosines (4 more channels each).
        plain_attention: use matrix products and a softmax instead of torch's fused attention. On processors, at a few
            dozen latents, its backward pass is a quarter faster; on GPUs leave it off.
        lora_rank: train a LoRA adapter of this rank on the U-Net's attention instead of all its weights; 0 for none. The
            text projection (and refiner) are trained whole in either case.
        lora_alpha, lora_target_modules, lora_kind: of that adapter, as LoraConfig has them.
    """

    name: str = option("nano", of="weights")
    class_name: str = option("UNet2DConditionModel", accepts=one_of(*DENOISERS))
    arguments: dict[str, Any] = field(default_factory=dict)
    coordinates: int = option(0, of="weights")
    plain_attention: bool = option(False, free="always")
    lora_rank: int = option(0, accepts=not_negative)
    lora_alpha: int = option(16, accepts=positive)
    lora_target_modules: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    lora_kind: str = option("lora", accepts=one_of(*ADAPTERS))

    @property
    def adapter(self) -> dict[str, Any]:
        """Its adapter, as a checkpoint describes one."""
        targets = list(self.lora_target_modules)
        return {"rank": self.lora_rank, "alpha": self.lora_alpha, "target_modules": targets, "kind": self.lora_kind}


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

    name: str = option("nano", of="weights")
    path: str | None = option(None, free="resume")
    hub: str | None = option(None, free="resume")
    revision: str | None = option(None, free="resume")
    subfolder: str | None = option(None, free="resume")
    factor: int = option(8, of="latents weights", accepts=positive)
    latent_channels: int = option(4, of="latents weights", accepts=positive)
    scaling_factor: float | None = option(None, of="weights", accepts=positive)
    dtype: str = option("float32", of="latents", accepts=one_of(*DTYPES))
    sample: bool = True


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
        flow_shift: shift of the flow's times towards high noise for large images (2403.03206, eq. 23): t' = s t / (1 + (s - 1) t).
        flow_shift_side: latents along the side of the square for which ``flow_shift`` is meant. Latents of h x w are shifted by
            flow_shift sqrt(h w) / flow_shift_side (section 5.3.2), in training and in sampling. None: sampling alone shifts, by
            flow_shift at every size.
        layout_weight: of the layout head's squared error beside the diffusion loss.
        layout_share: of a stage's steps, the first ones, which train the text path by the layout loss alone, without the
            denoiser, in less time each.
        distill_steps: into how many steps, of one forward each, guided sampling with the weights that the stage starts from is
            distilled (training/distillation.py); 0: nothing is distilled, and the denoiser learns from the data.
        distill_substeps: guided steps of the teacher that each of them takes the place of.
        distill_guidance: the least and the most guidance scale. Each sample draws its own, which the U-Net is given as an embedding;
            other scales cannot be drawn with afterwards.
        align_weight: of the alignment of the U-Net's deepest block with what a frozen vision encoder sees in the clean picture
            (models/vision.py), beside the diffusion loss; 0: none.
        align_until: of a stage's steps, the first ones, which have it; None: all.
        align_encoder: a folder, or an id on the hub, of a vision transformer of transformers, such as facebook/dinov2-base.
    """

    name: str = "paper"
    prediction: str = option("epsilon", of="noise", accepts=one_of(*PREDICTIONS))
    beta_schedule: str = option("scaled_linear", of="noise", accepts=one_of("scaled_linear", "linear", "squaredcos_cap_v2"))
    beta_start: float = option(0.00085, of="noise")
    beta_end: float = option(0.012, of="noise")
    train_timesteps: int = option(1000, of="noise", accepts=positive)
    zero_terminal_snr: bool = option(False, of="noise")
    density: str = option("uniform", accepts=one_of("uniform", "logit_normal"))
    logit_mean: float = 0.0
    logit_std: float = option(1.0, accepts=positive)
    min_snr_gamma: float | None = None
    flow_shift: float = option(1.0, accepts=positive)
    flow_shift_side: int | None = option(None, accepts=positive)
    layout_weight: float = option(3.0, accepts=not_negative)
    layout_share: float = option(0.0, accepts=below_one)
    distill_steps: int = option(0, accepts=not_negative)
    distill_substeps: int = option(5, accepts=positive)
    distill_guidance: list[float] = field(default_factory=lambda: [1.0, 8.0])
    align_weight: float = option(0.0, accepts=not_negative)
    align_until: int | None = option(None, accepts=positive)
    align_encoder: str | None = option(None)

    def check(self) -> None:
        check_values(self, "objective.")  # a checkpoint's is checked by itself
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError(
                f"objective.beta_start={self.beta_start} and objective.beta_end={self.beta_end} must lie between 0 and 1, start first."
            )
        if len(self.distill_guidance) != 2 or not 0 <= self.distill_guidance[0] <= self.distill_guidance[1] <= 100:
            raise UserError(
                f"objective.distill_guidance={list(self.distill_guidance)} must be two scales within 0 to 100, the least first, such as "
                "[1,8]."
            )
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
        guidance_start, guidance_stop: guide only while the share of steps done lies between them.
        guidance_sigma_min, guidance_sigma_max: guide only while the noise level sigma / alpha lies above the one and not above the
            other (arXiv 2404.07724; for the flow sigma / (1 - sigma)). None for no limit above.
        score_bins: the bin of each of conditioning.scores that is asked for: 1 is the lowest, 0 none; of a score that is not named, the
            highest.
    """

    solver: str = "dpm"
    steps: int = 100
    guidance: float = 7.5
    guidance_rescale: float = 0.0
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    guidance_sigma_min: float = 0.0
    guidance_sigma_max: float | None = None
    score_bins: dict[str, int] = field(default_factory=dict)

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
        highest = math.inf if self.guidance_sigma_max is None else self.guidance_sigma_max
        if not 0 <= self.guidance_sigma_min < highest:
            raise UserError(
                f"guidance_sigma_min={self.guidance_sigma_min} must lie below guidance_sigma_max={self.guidance_sigma_max}, and "
                "neither below 0."
            )


def check_bins(key: str, asked: dict[str, int], scores: dict[str, int]) -> None:
    """Raise UserError for a score that a model with these conditioning.scores is not told, or a bin that it does not have."""
    for name, number in asked.items():
        if not 0 <= number <= scores.get(name, -1):
            known = ", ".join(f"{one}: 0 to {count}" for one, count in scores.items())
            raise UserError(f"{key}={{{name}: {number}}} is nothing that this model is told; its scores are {known or 'none'}.")


@dataclass
class SourceConfig:
    """One of several sets of samples that are mixed.

    Attributes:
        name: in the log and in messages; None for the end of its path.
        shards, folder: one of them, as in DataConfig.
        weight: its share of the samples, against the other sources' weights.
        captions: weights of caption kinds of its own; empty for those of DataConfig.
    """

    name: str | None = option(None, free="data")
    shards: Any = option(None, free="data")
    folder: str | None = option(None, free="data")
    weight: float = 1.0
    captions: dict[str, float] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """``name``, or what is fixed of the last part of the path: "web" for "web/{000..099}.tar" and "web-{0..9}.tar"."""
        if self.name:
            return self.name
        path = self.folder or (self.shards if isinstance(self.shards, str) else next(iter(self.shards or ()), ""))
        parts = [re.split(r"[{*?\[]", part)[0].removesuffix(".tar").strip("-_. ") for part in str(path).split("/")]
        return next((part for part in reversed(parts) if part), "data")

    def check(self, key: str) -> None:
        if (self.shards is None) == (self.folder is None):
            found = "neither" if self.shards is None else "both"
            raise UserError(f"{key} has {found} of shards and folder; expected one of them.")
        positive(f"{key}.weight", self.weight)
        if self.captions:
            check_captions(f"{key}.captions", self.captions)


def check_captions(key: str, weights: dict[str, float]) -> None:
    """Raise UserError unless some caption kind has a weight, and none a negative one."""
    if not sum(weights.values()) > 0 or any(not weight >= 0 for weight in weights.values()):
        raise UserError(f"{key}={weights} gives no caption kind a weight; expected for example {{short: 0.5, long: 0.5}}.")


@dataclass
class DataConfig:
    """Shards, buckets and captions.

    Attributes:
        shards, val_shards: a folder, a glob, a brace range, or a list of them.
        folder: in place of ``shards``, a folder of images with .txt or .json beside them.
        sources: several sets with weights, in place of ``shards``.
        demo: make the built-in scenes at ``demo_folder`` when they are missing.
        world: "small": up to four objects at 64 pixels; "large": up to nine at 96, in a folder and sizes of its own.
        demo_set: which of its sets a stage trains on: "web", "big" or "small".
        demo_sizes: how many scenes of each set.
        resolution: images have about resolution squared pixels, in buckets of several aspect ratios.
        lower_resolutions: further ones, for images that ``resolution`` would enlarge: each goes to the largest that has no more
            pixels than it (multi-scale training).
        bucket_multiple: sides are multiples of this many pixels (codec factor times the U-Net's own downsampling).
        captions: weight of each kind of caption; a sample without the drawn kind falls back to another of its kinds.
            Empty here, since a default would be merged with what a stage sets.
        caption_dropout: share of captions replaced by the null prompt, for classifier-free guidance.
        window_shards: shards that are shuffled together.
        workers: processes that read for each training process; None: its share of the cores, at most 8.
        retries: further tries, with growing pauses, after an error of a remote store that may pass.
        cache_dir, cache_gb: keep whole remote shards in this local folder, up to so many GB; None: read single samples.
        index_dir: where scripts/index_shards.py has put indexes that do not lie beside their shards (its ``output=``).
        streaming: read remote shards without an index, in an order that cannot be resumed exactly.
        max_bad_fraction: stop when more than this share of the samples could not be read, beyond what chance explains.
        allow_truncated: use the whole samples of a shard that is cut in the middle.
        cache: a folder of latents and text features made beforehand by scripts/cache.py, which must fit; None for none.
    """

    shards: Any = option(None, typed="paths", free="data")
    folder: str | None = option(None, free="data")
    sources: list[SourceConfig] = option(list, typed="yaml")
    val_shards: Any = option(None, typed="paths", free="resume")
    demo: bool = option(False, free="always")
    world: str = option("small", free="data", accepts=one_of(*WORLDS))
    demo_folder: str = option("data/demo", free="data")
    demo_set: str = option("web", free="data")
    demo_sizes: dict[str, int] = option(dict, free="data")
    resolution: int = option(64, of="latents", accepts=positive)
    lower_resolutions: list[int] = option(list, of="latents")
    bucket_multiple: int = option(16, of="latents")
    max_aspect: float = option(2.0, of="latents")
    captions: dict[str, float] = option(dict, of="text")
    caption_dropout: float = option(0.1, accepts=fraction)
    window_shards: int = option(16, accepts=positive)
    workers: int | None = option(None, free="always", accepts=not_negative)
    retries: int = option(5, free="always", accepts=not_negative)
    cache_dir: str | None = option(None, free="always")
    cache_gb: float = option(100.0, free="always", accepts=positive)
    index_dir: str | None = option(None, free="data")
    streaming: bool = False
    max_bad_fraction: float = option(0.01, free="resume", accepts=fraction)
    allow_truncated: bool = option(False, free="data")
    cache: str | None = option(None, free="always")

    def check(self) -> None:
        levels = sorted([*self.lower_resolutions, self.resolution])
        if levels[-1] != self.resolution or any(low < 1 or high < 1.25 * low for low, high in pairwise(levels)):
            raise UserError(
                f"data.lower_resolutions={list(self.lower_resolutions)} does not go with data.resolution={self.resolution}; "
                "expected lower ones, each at most 0.8 of the next higher, such as [256] below 512."
            )
        if self.streaming and (self.sources or self.folder):
            raise UserError("data.streaming=true reads data.shards alone; leave out data.sources and data.folder.")
        if self.max_aspect < 1:
            raise UserError(f"data.max_aspect={self.max_aspect} is out of range; expected 1 or more.")
        check_captions("data.captions", self.captions)
        for number, source in enumerate(self.sources):
            source.check(f"data.sources[{number}]")
        titles = [source.title for source in self.sources]
        if twice := next((title for title in titles if titles.count(title) > 1), None):
            raise UserError(f"data.sources has two sources called {twice}; give each a name of its own (name: ...).")


@dataclass
class OptimizerConfig:
    """One learning rate per part, linear warm-up, and a schedule that is a function of the step.

    Attributes:
        name: one of OPTIMIZERS, with its library's defaults but for the keys here; "muon" is for matrices, beside AdamW for
            everything else (see training/optim.py).
        fused: one kernel for all parameters, on a GPU and on a processor, where the optimiser has one.
        lr, lr_conditioning, lr_lora: of the U-Net, of refiner and linear projection, of the adapter.
        schedule: after the warm-up "constant", "cosine", "linear", or "trapezoid": constant, then linear over the last
            ``decay`` of the steps after the warm-up; down to ``final_lr`` times the rate.
        momentum: of muon, sgd, sgd_schedulefree and rmsprop.
    """

    name: str = option("adamw", accepts=one_of(*OPTIMIZERS))
    fused: bool = option(True, free="always")
    lr: float = option(1e-4, accepts=positive)
    lr_conditioning: float = option(1e-4, accepts=positive)
    lr_lora: float = option(1e-4, accepts=positive)
    beta1: float = option(0.9, accepts=below_one)
    beta2: float = option(0.999, accepts=below_one)
    eps: float = option(1e-8, accepts=not_negative)
    weight_decay: float = option(0.01, accepts=not_negative)
    warmup_steps: int = option(0, accepts=not_negative)
    schedule: str = option("constant", accepts=one_of("constant", "cosine", "linear", "trapezoid"))
    final_lr: float = option(0.0, accepts=fraction)
    decay: float = option(0.4, accepts=fraction)
    momentum: float = option(0.95, accepts=below_one)
    max_grad_norm: float = option(1.0, accepts=positive)


@dataclass
class ValidationConfig:
    """What is measured while training.

    Attributes:
        samples: held-out samples whose loss is taken at fixed noise, once with short and once with long captions.
        images: pictures drawn for the grid at fixed prompts and seeds; 0 for none.
        prompts: a file of prompts as sample.py's prompt_file takes it, drawn at each validation besides those ``images``.
        scenes: held-out scenes drawn and scored for alignment at the stage's end, where the shards carry ground truth; with
            keep_best=binding at each validation.
        paragraph: the kind of caption that pictures are drawn from; the longest one where a sample has none of it.
        unseen: of these samples, how many are drawn and scored once more, from their captions of the kind "unseen", whose
            wording no training caption has.
        batch_size: images per process at once.
    """

    samples: int = option(64, accepts=not_negative)
    images: int = option(8, accepts=not_negative)
    prompts: str | None = None
    scenes: int = option(0, accepts=not_negative)
    paragraph: str = "clean"
    unseen: int = option(0, accepts=not_negative)
    batch_size: int = option(32, accepts=positive)


@dataclass
class TrackerConfig:
    """Where metrics go besides log.jsonl: "jsonl" (nowhere else), "wandb" or "tensorboard"."""

    name: str = option("jsonl", accepts=one_of("jsonl", "wandb", "tensorboard"))
    project: str = "paradiffusion"
    run_name: str | None = None
    mode: str | None = None


@dataclass
class TrainConfig:
    """One stage of training. Stages differ in values only: there is one training loop.

    Attributes:
        recipe: a set of values for one kind of machine (configs/recipe), merged after preset and stage.
        batch_size, micro_batch_size: samples of one optimiser step over all processes, and of one process at most at once:
            the largest such number that divides its share of the batch is taken.
        repeats: noise levels at which each sample of a batch is seen; its text is read, and its image encoded, once for all.
        precision: "fp32" (without TF32 on GPUs), "bf16", or "auto": bf16 on GPUs and on processors that multiply it faster, else
            fp32. (fp16 would need its loss scale in every checkpoint.)
        keep_gb: keep text features and latents of the frozen models in memory, made once, while each process has so many GB of
            them; 0 to make them in every epoch.
        gradient_checkpointing: compute activations again on the way back: true, those of the U-Net and of a language model that is
            trained; "half", those of every second layer of that language model; false, none. scripts/describe.py says what fits.
        keep_best: keep the checkpoint of the best validation besides the newest ``keep_last`` and every ``keep_every``-th step, and
            name it in the stage's ``best``: "loss_long", the lowest held-out loss on long captions, or "binding", the most colours
            at their places in validation.scenes. patience: validations after it that are no better, with which the stage ends.
        async_save: checkpoints are copied to main memory and written while the next steps run; None does so on GPUs.
        ema_device: "cpu" keeps the average off the GPU; None keeps it beside the weights.
        compile: torch.compile of the U-Net and of the language model's layers. channels_last: the U-Net's memory layout, on a GPU
            with ``compile`` too (but under DeepSpeed, which has none). Neither changes what is computed.
        deterministic: the same bits on the same GPUs, run again or resumed; slower. On processors it is so in any case.
        preflight: one step of the largest bucket with the longest captions, validation and a save, reported and undone.
        log_samples: write each step's sample keys and digests to ``samples_seen/`` in the stage folder, by which
            scripts/replay.py shows that it has the same bytes.
        stall_seconds: after so long without a step a process is named with its rank, phase and samples.
    """

    preset: str = option("nano", free="always")
    stage: int = 1
    recipe: str = option("none", free="always")
    run_dir: str = option("runs/nano", free="always", accepts=on_disk)
    init_from: str | None = option(None, free="resume")
    resume: bool = option(True, free="always")
    seed: int = 0

    train_text: str = option("frozen", accepts=one_of("frozen", "lora", "adapter"))
    max_steps: int = option(1000, free="resume", accepts=positive)
    batch_size: int = option(32, accepts=positive)
    micro_batch_size: int | None = option(None, free="always", accepts=positive)
    repeats: int = option(1, accepts=positive)
    keep_gb: float = option(0.0, free="resume", accepts=not_negative)
    precision: str = option("fp32", accepts=one_of("fp32", "bf16", "auto"))
    gradient_checkpointing: Any = option(False, free="always", accepts=one_of(True, False, "half"))
    threads: int | None = option(None, free="always", accepts=positive)
    log_every: int = option(10, free="always", accepts=positive)
    validate_every: int = option(500, free="always", accepts=positive)
    checkpoint_every: int = option(500, free="always", accepts=positive)
    keep_last: int = option(2, free="always", accepts=positive)
    keep_every: int | None = option(None, free="always", accepts=positive)
    keep_best: str | None = option(None, free="always", accepts=one_of("loss_long", "binding"))
    patience: int | None = option(None, free="resume", accepts=positive)
    async_save: bool | None = option(None, free="always")
    ema_decay: float = option(0.9999, accepts=below_one)
    ema_device: str | None = option(None, free="always", accepts=one_of("cpu"))
    compile: bool = option(False, free="always")
    deterministic: bool = option(False, free="always")
    channels_last: bool = option(False, free="always")
    preflight: bool = option(False, free="always")
    log_samples: bool = option(False, free="always")
    stall_seconds: float = option(600.0, free="always", accepts=positive)
    on_spike: str = option("stop", free="resume", accepts=one_of("stop", "skip", "rollback"))
    spike_factor: float = option(10.0, free="resume")

    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sampler: SamplerConfig = option(SamplerConfig, free="resume")
    validation: ValidationConfig = option(ValidationConfig, free="resume")
    tracker: TrackerConfig = option(TrackerConfig, free="always")

    def check(self) -> None:
        """Raise UserError for values out of range and for combinations that cannot work."""
        check_values(self)
        if not self.spike_factor > 1:
            raise UserError(f"spike_factor={self.spike_factor} is out of range; expected a number above 1.")
        for part in (self.conditioning, self.lora, self.objective, self.data, self.sampler):
            part.check()
        check_bins("sampler.score_bins", self.sampler.score_bins, self.conditioning.scores)
        self.check_best()
        for key, value in self.unet.arguments.items():
            if "dropout" in key and value:
                raise UserError(
                    f"unet.arguments.{key}={value} would be drawn from torch's global generator, so that no run could be resumed or "
                    "replayed; leave it out (data.caption_dropout and optimizer.weight_decay are there)."
                )
        if self.objective.layout_share and not (self.conditioning.layout_patch and self.objective.layout_weight):
            raise UserError(
                f"objective.layout_share={self.objective.layout_share} trains by the layout loss alone, and there is none with "
                "conditioning.layout_patch=0 or objective.layout_weight=0; leave one of them out."
            )
        if self.objective.distill_steps:
            self.check_distillation()
        if self.objective.align_weight:
            self.check_alignment()
        if self.train_text == "lora" and self.text_encoder.quantization and self.lora.kind not in ("lora", "rslora"):
            raise UserError(
                f"lora.kind={self.lora.kind} computes with the weights that it adapts, and text_encoder.quantization="
                f"{self.text_encoder.quantization} has packed ones; set lora.kind=lora or rslora, or text_encoder.quantization=null."
            )
        if self.data.bucket_multiple % self.codec.factor:
            raise UserError(f"data.bucket_multiple={self.data.bucket_multiple} must be a multiple of codec.factor={self.codec.factor}.")

    def check_distillation(self) -> None:
        """Raise UserError for what does not go with objective.distill_steps."""
        low, high = self.objective.distill_guidance
        if not low <= self.sampler.guidance <= high:
            raise UserError(
                f"sampler.guidance={self.sampler.guidance} lies outside of objective.distill_guidance={[low, high]}, for which "
                "the model is distilled; set either."
            )
        for key, value, needed in (
            ("train_text", self.train_text == "lora", "frozen"),
            ("repeats", self.repeats > 1, 1),
            ("sampler.solver", self.sampler.solver != "dpm", "dpm"),
            ("objective.layout_share", self.objective.layout_share > 0, 0),
            ("unet.class_name", self.unet.class_name != "UNet2DConditionModel", "UNet2DConditionModel"),
        ):
            if value:
                raise UserError(
                    f"objective.distill_steps={self.objective.distill_steps} does not go with {key}={attrgetter(key)(self)}; "
                    f"set {key}={needed}."
                )

    def check_alignment(self) -> None:
        """Raise UserError for what does not go with objective.align_weight."""
        if not self.objective.align_encoder:
            raise UserError(
                f"objective.align_weight={self.objective.align_weight} aligns with a vision encoder; set objective.align_encoder= to a "
                "folder or a hub id, such as facebook/dinov2-base."
            )
        for key, value, needed in (
            ("objective.distill_steps", self.objective.distill_steps > 0, 0),
            ("unet.class_name", self.unet.class_name != "UNet2DConditionModel", "UNet2DConditionModel"),
            ("compile", self.compile, "false"),
        ):
            if value:
                raise UserError(f"objective.align_weight does not go with {key}={attrgetter(key)(self)}; set {key}={needed}.")

    def check_best(self) -> None:
        """Raise UserError where nothing is measured by which a checkpoint could be the best."""
        if self.keep_best is None:
            if self.patience is not None:
                raise UserError(
                    f"patience={self.patience} counts validations without a better keep_best, which is not set; set "
                    "keep_best=loss_long or keep_best=binding, or leave patience out."
                )
            return
        needed = {"loss_long": "samples", "binding": "scenes"}[self.keep_best]
        if self.data.val_shards is None or not getattr(self.validation, needed):
            raise UserError(
                f"keep_best={self.keep_best} is measured on held-out samples, and there are none; set data.val_shards=, and "
                f"validation.{needed}= to how many."
            )


@dataclass
class FrozenConfig:
    """Where a frozen model lies on this machine, and in which dtype it runs; None: as the checkpoint says."""

    path: str | None = option(None)
    dtype: str | None = option(None, accepts=one_of(*DTYPES))


@dataclass
class DrawingKeys:
    """How pictures are drawn, as sample.py and scripts/evaluate.py take it; None means the checkpoint's own default."""

    unet: str = option("unet", typed="text")
    steps: int | None = option(None, accepts=positive)
    guidance: float | None = None
    height: int | None = option(None, accepts=positive)
    width: int | None = option(None, accepts=positive)
    negative_prompt: str | None = option(None, typed="text")
    sampler: str | None = option(None, typed="text")
    solver: str | None = None
    guidance_rescale: float | None = None
    guidance_start: float | None = None
    guidance_stop: float | None = None
    guidance_sigma_min: float | None = None
    guidance_sigma_max: float | None = None
    device: str | None = None
    dtype: str = option("auto", accepts=one_of("auto", *DTYPES))
    threads: int | None = option(None, accepts=positive)
    compile: bool = False
    channels_last: bool = False
    offload_text_encoder: bool = False
    vae_tiling: bool = False
    text_encoder: FrozenConfig = field(default_factory=FrozenConfig)
    codec: FrozenConfig = field(default_factory=FrozenConfig)


@dataclass
class SampleConfig(DrawingKeys):
    """What ``sample.py`` takes; None means the checkpoint's own default, or the prompt line's own value. configs/sample.yaml
    says what each key is."""

    ckpt: str | None = option(None)
    prompt: str | None = option(None, typed="text")
    prompt_file: str | None = option(None)
    output_dir: str | None = option(None, accepts=on_disk)
    seed: int = 0
    images_per_prompt: int = option(1, accepts=positive)
    batch_size: int = option(8, accepts=positive)
    score_bins: dict[str, int] | None = None

    def check(self) -> None:
        """Raise UserError for missing, contradictory or impossible values."""
        if not self.ckpt:
            raise UserError("ckpt= is missing; name a run, a stage or a checkpoint, such as ckpt=data/nano or ckpt=runs/nano/stage3.")
        if (self.prompt is None) == (self.prompt_file is None):
            found = "neither" if self.prompt is None else "both"
            raise UserError(f"expected one of prompt= and prompt_file=, found {found}; prompt_file=prompts.txt is the main way.")
        check_values(self)
