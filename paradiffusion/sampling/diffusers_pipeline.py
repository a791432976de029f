"""ParaDiffusion as a ``diffusers.DiffusionPipeline``: the same models and the same sampler behind diffusers' own interface.

    pipe = ParaDiffusionPipeline.from_pretrained("exported").to("cuda")
    image = pipe("a long paragraph", generator=torch.Generator().manual_seed(0)).images[0]

Load it through this class: ``diffusers.DiffusionPipeline.from_pretrained`` looks among diffusers' own classes alone, and says
that it has no ParaDiffusionPipeline.

The text encoder is saved without its adapter, which lies beside it in ``text_encoder_lora/``, since a pipeline cannot save a
model that PEFT has wrapped. What our ``checkpoint.json`` says is the ``description`` in ``model_index.json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ConfigMixin,
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
    PixArtTransformer2DModel,
    SchedulerMixin,
    UNet2DConditionModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paradiffusion.checkpoints.layouts import (
    LORA,
    PEFT_PREFIX,
    load_adapter,
    objective_of,
    parse,
    portable,
    read_adapter,
    split_parts,
    write_adapter,
)
from paradiffusion.config import CodecConfig, ConditioningConfig, LoraConfig, SamplerConfig, TextEncoderConfig
from paradiffusion.diffusion.objective import Objective, set_steps
from paradiffusion.models.codec import Codec
from paradiffusion.models.joint import JointModel
from paradiffusion.sampling.pipeline import InferenceModels, checked_side, encode_prompts, is_guided
from paradiffusion.sampling.sampler import check_distilled, check_scheduler, sample_latents
from paradiffusion.text.conditioning import Conditioning
from paradiffusion.text.encoder import TextEncoder, is_adapter
from paradiffusion.text.families import cut_layers
from paradiffusion.text.refiner import Refiner
from paradiffusion.text.tokenizer import load_tokenizer

logger = logging.get_logger(__name__)
# Where model_index.json of pipelines exported before looks for the refiner: diffusers takes modules that are imported already.
sys.modules["paradiffusion.sampling.pipeline_components"] = sys.modules[__name__]
Prompts = str | list[str]
Embedded = tuple[Tensor | None, Tensor | None]  # features and their mask


class RefinerModel(ModelMixin, ConfigMixin):
    """The refiner as a component that a pipeline saves and loads; see ``paradiffusion.text.refiner.Refiner``."""

    @register_to_config
    def __init__(
        self, input_width: int, width: int, layers: int, heads: int, kernel: int = 0, layout: dict[str, Any] | None = None,
        reach: float = 0, scores: dict[str, int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.refiner = Refiner(input_width, width, layers, heads, kernel, layout, reach, scores)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Any:
        return self.refiner(features, mask)


def pipeline_objective(pipeline: Any) -> Objective:
    """The objective of a pipeline's description, sampled by whatever scheduler the pipeline has now."""
    objective = objective_of(pipeline.config["description"])

    def schedulers(solver: str, **overrides: Any) -> Any:
        """A fresh one of the pipeline's kind, so that none of its state is left over from the image before."""
        own = pipeline.scheduler
        if "flow_shift" in overrides and "shift" in own.config:  # as FlowMatchEuler and its like call it
            overrides["shift"] = overrides.pop("flow_shift")
        if "clip_sample" in own.config:  # pipelines exported before do not say that latents are not to be clipped
            overrides["clip_sample"] = False
        return type(own).from_config(own.config, **overrides)

    objective.schedulers = schedulers
    return objective


def settings_of(scheduler: Any) -> dict[str, Any]:
    """The class and the configuration of a scheduler, as JSON has them."""
    values = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    return {"class": type(scheduler).__name__, **json.loads(json.dumps(values, default=str))}


def plain(model: Any) -> Any:
    """The module that torch.compile has wrapped, or ``model`` itself."""
    return getattr(model, "_orig_mod", model)


def unload_adapter(model: Any) -> None:
    """Take the adapter that PEFT has put into a language model's layers out of it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(name, module.get_base_layer())
    vars(model).pop("peft_config", None)  # by which PEFT would take the next one for a second adapter


class _Interrupted(Exception):
    """``pipe._interrupt`` was set within a callback."""


_Base: Any = DiffusionPipeline  # diffusers gives type checkers a stand-in without methods


class ParaDiffusionPipeline(_Base):
    """Draws images from paragraphs.

    Args:
        vae: AutoencoderKL; ``text_encoder``, ``tokenizer``: the language model as transformers has it; ``unet``: the
            denoiser, a transformer too; ``scheduler``: the solver.
        refiner: of the modern arm; None for the paper's.
        description: what ``checkpoint.json`` says: conditioning, adapter, codec, objective, sampler defaults.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    # Small, and used outside of its forward too, where no hook would bring it to the device.
    _exclude_from_cpu_offload = ["refiner"]  # noqa: RUF012 - diffusers' own name and type
    _optional_components = ["refiner"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        vae: AutoencoderKL, text_encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
        unet: UNet2DConditionModel | PixArtTransformer2DModel,  # from_pipe compares the class itself
        scheduler: SchedulerMixin, refiner: RefinerModel | None = None, description: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if description is None:
            raise ValueError(
                "a ParaDiffusionPipeline needs its description; load it with from_pretrained, or pass another pipeline's: "
                "ParaDiffusionPipeline(**pipe.components, description=pipe.config['description'])"
            )
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, refiner=refiner)
        self.register_to_config(description=description)
        encoder = parse(TextEncoderConfig, description["text_encoder"])
        if encoder.layers is not None and encoder.layers < text_encoder.config.num_hidden_layers:
            cut_layers(text_encoder, encoder)  # where the component is a link to the whole model
        models: list[Any] = [vae, text_encoder, unet, refiner]
        for model in models:
            if model is not None:
                model.requires_grad_(False).eval()
        self._adapter = self.adapter()
        self._interrupt = False
        self.image_processor = VaeImageProcessor(vae_scale_factor=parse(CodecConfig, description["codec"]).factor)

    def _text(self) -> TextEncoder:
        description = self.config["description"]
        settings, source = parse(ConditioningConfig, description["conditioning"]), description["text_encoder"]
        return TextEncoder(self.text_encoder, self.tokenizer, settings, {"hash": source.get("hash")})

    @classmethod
    def from_models(cls, models: InferenceModels, description: dict[str, Any]) -> ParaDiffusionPipeline:
        """A pipeline of a loaded checkpoint's models, which it shares; an adapter on the text encoder stays on it."""
        refiner = None
        if models.joint.refiner is not None:
            refiner = RefinerModel(**models.joint.refiner.config)
            refiner.refiner = models.joint.refiner
        wrapped = models.text_encoder.model
        base = wrapped.get_base_model() if description["lora"] is not None else wrapped
        return cls(
            vae=models.codec.vae, text_encoder=base, tokenizer=models.text_encoder.tokenizer, unet=models.joint.unet,
            scheduler=models.objective.scheduler(models.sampler.solver), refiner=refiner, description=portable(description),
        )  # fmt: skip

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> ParaDiffusionPipeline:
        """As ``DiffusionPipeline.from_pretrained``; without ``torch_dtype`` the frozen models keep the dtype
        they were trained with, and the others are in bfloat16 where there is CUDA, else in float32."""
        source = str(pretrained_model_name_or_path)
        hub = {key: kwargs[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in kwargs}
        described = cls.load_config(source, **hub).get("description") or {}
        beside = Path(source)
        if not beside.is_dir():
            from huggingface_hub import snapshot_download

            beside = Path(snapshot_download(source, allow_patterns=["tokenizer/*", f"{LORA}/*"], **hub))
        if "tokenizer" not in kwargs and (beside / "tokenizer").is_dir():
            kwargs["tokenizer"] = load_tokenizer(beside / "tokenizer")  # by its files' own rules
        if not {"torch_dtype", "dtype"} & kwargs.keys():
            kwargs["dtype"] = {"default": torch.bfloat16 if torch.cuda.is_available() else torch.float32}
            for part, key in (("text_encoder", "text_encoder"), ("vae", "codec")):
                kwargs["dtype"][part] = getattr(torch, described.get(key, {}).get("dtype", "float32"))
        pipe: ParaDiffusionPipeline = super().from_pretrained(source, **kwargs)
        if pipe.config["description"]["lora"] is not None:
            named = read_adapter(beside / LORA)
            if not (carried := pipe.adapter()):
                pipe._attach(named)
            elif carried.keys() != named.keys() or not all(t.equal(named[n].to(t)) for n, t in carried.items()):
                raise ValueError("text_encoder= carries another adapter than this pipeline's; pass one without it")
        return pipe

    def save_pretrained(self, save_directory: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """As ``DiffusionPipeline.save_pretrained``, with the adapter beside the plain text encoder."""
        folder = Path(save_directory)
        adapter = self.adapter()
        if adapter:
            unload_adapter(plain(self.text_encoder))
        try:
            super().save_pretrained(folder, safe_serialization=safe_serialization, **kwargs)
        finally:
            if adapter:
                self._attach(adapter)
        # So that the folder alone is a text encoder as text_encoder.path= takes it.
        self.tokenizer.save_pretrained(folder / "text_encoder")
        self.save_adapter(folder)

    def save_adapter(self, folder: Path) -> None:
        """Write ``text_encoder_lora/`` below ``folder``, where there is an adapter."""
        if adapter := self.adapter():
            write_adapter(folder / LORA, split_parts(adapter)[LORA], self.config["description"]["lora"])

    def adapter(self) -> dict[str, Tensor]:
        """The text encoder's adapter by the joint module's names; empty where there is none."""
        own = plain(self.text_encoder).named_parameters()
        prefix = f"text_encoder.model.{PEFT_PREFIX}"
        return {f"{prefix}{name}": p.detach().cpu().contiguous() for name, p in own if is_adapter(name)}

    def _attach(self, adapter: dict[str, Tensor]) -> None:
        """Put an adapter into the text encoder's layers, where the pipelines that share the component find it, too."""
        lora, model = self.config["description"]["lora"], plain(self.text_encoder)
        device, encoder = model.device, self._text()
        encoder.model = model
        load_adapter(encoder, adapter, parse(LoraConfig, dict(lora)), lora.get("settings"))
        model.to(device)
        self._adapter = adapter

    @property
    def models(self) -> InferenceModels:
        """The components that the pipeline has now (``pipe.unet = torch.compile(pipe.unet)`` is usual) as ``sample.py`` has its
        models, on the pipeline's execution device."""
        description = self.config["description"]
        if self._adapter and not self.adapter():  # another language model was put there
            self._attach(self._adapter)
        inner = None if self.refiner is None else self.refiner.refiner
        objective, positions = pipeline_objective(self), description["conditioning"].get("key_positions", False)
        joint = JointModel(self.unet, inner, objective, description["coordinates"], key_positions=positions)
        codec = Codec(self.vae, parse(CodecConfig, description["codec"]), {"hash": description["codec"].get("hash")})
        return InferenceModels(
            joint, self._text(), codec, joint.objective, parse(SamplerConfig, description["sampler"]), description["resolution"],
            self._execution_device, self.unet.dtype, str(self.config.get("_name_or_path", "")), description["step"],
            description["provenance"],
        )  # fmt: skip

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompts | None = None, height: int | None = None, width: int | None = None, num_inference_steps: int | None = None,
        guidance_scale: float | None = None, negative_prompt: Prompts | None = None, num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        guidance_rescale: float | None = None, guidance_start: float | None = None, guidance_stop: float | None = None,
        guidance_sigma_min: float | None = None, guidance_sigma_max: float | None = None,
        score_bins: dict[str, int] | None = None,
        latents: Tensor | None = None, prompt_embeds: Tensor | None = None, prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None, negative_prompt_attention_mask: Tensor | None = None,
        eta: float | None = None, output_type: str = "pil", return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:  # fmt: skip
        """Draw ``num_images_per_prompt`` images of each prompt.

        Args:
            prompt: one or a list; longer ones than the text encoder takes are cut, with a warning.
            height, width: pixels; None for the checkpoint's own resolution.
            num_inference_steps, guidance_scale, guidance_..., score_bins: as SamplerConfig has them; None for the checkpoint's own.
            negative_prompt: takes the empty prompt's place in guidance; one, or one a prompt.
            generator: of the CPU: one, drawn from in turn, or one an image. ``torch.Generator().manual_seed(seed)`` gives
                what ``sample.py seed=`` gives.
            latents: noise to start from, [B, C, h, w], in place of the generators' own.
            prompt_embeds, prompt_attention_mask, negative_...: what ``encode_prompt`` gave, in place of the texts.
            eta: of DDIM and its like alone.
            output_type: "pil", "np" ([B, H, W, 3] in 0..1), "pt" ([B, 3, H, W] in 0..1) or "latent" ([B, C, h, w]).
            callback_on_step_end: called as ``f(pipe, step, timestep, {"latents": ...})`` after each step; the latents of
                the dictionary that it returns go on. Setting ``pipe._interrupt`` ends the drawing there.
        Returns:
            ImagePipelineOutput, or a tuple of the images.
        Raises:
            ValueError: for arguments that do not go together; UserError for a size or setting that the model cannot take.
        """
        if self.config["description"]["lora"] is not None and not self.adapter():
            raise ValueError(
                "this model was trained with a LoRA adapter on its text encoder, which has none here: load it by "
                "ParaDiffusionPipeline.from_pretrained (DiffusionPipeline's custom_pipeline= leaves the adapter out)"
            )
        models = self.models
        given: dict[str, Any] = {
            "steps": num_inference_steps, "guidance": guidance_scale, "guidance_rescale": guidance_rescale,
            "guidance_start": guidance_start, "guidance_stop": guidance_stop,
            "guidance_sigma_min": guidance_sigma_min, "guidance_sigma_max": guidance_sigma_max, "score_bins": score_bins,
        }  # fmt: skip
        settings = replace(models.sampler, **{key: value for key, value in given.items() if value is not None})
        settings.check()
        height = checked_side("height", height or models.resolution, models.multiple)
        width = checked_side("width", width or models.resolution, models.multiple)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type} is unknown; choose one of pil, np, pt, latent")
        if others := set(callback_on_step_end_tensor_inputs) - {"latents"}:
            raise ValueError(f"callback_on_step_end_tensor_inputs names more than latents: {others}")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt} is out of range; expected 1 or more")
        negative = bool(negative_prompt) or negative_prompt_embeds is not None
        check_distilled(models.objective, settings, models.sampler, negative)
        guided = is_guided(settings.guidance, models.objective)
        if negative and not guided:
            logger.warning(f"negative_prompt has no effect at guidance_scale={settings.guidance}")
        told, against = (prompt_embeds, prompt_attention_mask), (negative_prompt_embeds, negative_prompt_attention_mask)
        conditioning = self._conditioning(prompt, negative_prompt, told, against, settings.score_bins).repeat_each(num_images_per_prompt)
        own = objective_of(self.config["description"]).scheduler(models.sampler.solver)
        if settings_of(self.scheduler) != settings_of(own):
            check_scheduler(models.objective)
        size = height // models.factor, width // models.factor
        scheduler = models.objective.scheduler(size=size)
        set_steps(scheduler, settings.steps)
        self._interrupt = False
        reached = torch.empty(0)
        shape = models.latent_channels, *size
        if latents is not None and latents.shape != (len(conditioning), *shape):
            raise ValueError(f"latents= has the shape {list(latents.shape)}; expected {[len(conditioning), *shape]}")
        with self.progress_bar(total=len(scheduler.timesteps)) as bar:

            def on_step(done: int, latents: Tensor) -> Tensor | None:
                nonlocal reached
                bar.update()
                if callback_on_step_end is not None:
                    timestep = scheduler.timesteps[done - 1]
                    returned = callback_on_step_end(self, done - 1, timestep, {"latents": latents}) or {}
                    latents = returned.get("latents", latents)
                if self._interrupt:
                    reached = latents
                    raise _Interrupted
                return latents

            sources = generators_of(generator, len(conditioning))
            try:
                drawn = sample_latents(
                    models.denoise, models.objective, conditioning, sources, shape, settings, models.device, models.dtype,
                    on_step, latents, eta,
                )  # fmt: skip
            except _Interrupted:
                drawn = reached
        images = self._finish(models, drawn, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _conditioning(
        self, prompt: Prompts | None, negative: Prompts | None, told: Embedded, against: Embedded, score_bins: dict[str, int]
    ) -> Conditioning:
        """Of texts, or of what ``encode_prompt`` gave in their place."""
        if told[0] is not None and prompt is not None:
            raise ValueError("prompt= and prompt_embeds= are two ways to say the same; give one of them")
        if told[0] is None or against[0] is None:
            *texts, others, mask = self.encode_prompt(prompt if told[0] is None else [""] * len(told[0]), negative, score_bins)
            told = told if told[0] is not None else (texts[0], texts[1])
            against = against if against[0] is not None else (others, mask)
        assert told[0] is not None and against[0] is not None
        return Conditioning(told[0], told[1], against[0], against[1])

    @torch.no_grad()
    def encode_prompt(
        self, prompt: Prompts | None, negative_prompt: Prompts | None = None, score_bins: dict[str, int] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """What the denoiser is told: features [B, L, D] and mask [B, L] (None where padding is attended to) of the prompts, and those
        of the negative prompts, one or B, or of the empty one; ``score_bins`` as SamplerConfig has them, None for the checkpoint's own.
        Longer texts than the text encoder takes are cut, with a warning."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(one, str) for one in prompts):
            raise ValueError(f"prompt={prompt!r} is neither a text nor a list of texts")
        negatives = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt or [])
        models = self.models
        if cut := models.count_truncated([*prompts, *negatives]):
            logger.warning(f"{cut} of {len(prompts) + len(negatives)} prompts are longer than the text encoder's limit and are cut")
        asked = models.sampler.score_bins if score_bins is None else score_bins
        found = encode_prompts(models, list(prompts), negatives if any(negatives) else [], asked)
        return found.features, found.mask, found.null_features, found.null_mask

    def _finish(self, models: InferenceModels, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        if output_type == "pil":  # rounded to bytes just as sample.py does
            return self.image_processor.numpy_to_pil(models.decode(latents).numpy().astype("float32") / 255)
        images = (models.codec.decode(latents) + 1) / 2
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().float().numpy()


def generators_of(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[int | torch.Generator]:
    """One source of noise for each image."""
    if generator is None:
        return torch.randint(2**62, (count,)).tolist()
    single = isinstance(generator, torch.Generator)
    generators: list[Any] = [generator] * count if single else list(generator)  # type: ignore[arg-type]
    if len(generators) != count:
        raise ValueError(f"{len(generators)} generators for {count} images")
    if any(one.device.type != "cpu" for one in generators):
        raise ValueError("noise is drawn on the CPU, so that it is the same everywhere: use torch.Generator()")
    return generators
