"""What the diffusers pipeline adds to our modules: a refiner that it can save, its scheduler as our objective takes it, an
adapter that several pipelines share, and where its files are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from paradiffusion.checkpoints.layouts import parse
from paradiffusion.config import ObjectiveConfig
from paradiffusion.diffusion.objective import OBJECTIVES, Objective
from paradiffusion.text.refiner import Refiner


class RefinerModel(ModelMixin, ConfigMixin):
    """The refiner as a component that a pipeline saves and loads; see ``paradiffusion.text.refiner.Refiner``."""

    @register_to_config
    def __init__(
        self,
        input_width: int,
        width: int,
        layers: int,
        heads: int,
        kernel: int = 0,
        layout: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.refiner = Refiner(input_width, width, layers, heads, kernel, layout)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """As ``Refiner.forward``."""
        refined: Tensor = self.refiner(features, mask)
        return refined


def pipeline_objective(pipeline: Any) -> Objective:
    """The objective of a pipeline's description, sampled by whatever scheduler the pipeline has now."""
    description = pipeline.config["description"]
    config = parse(ObjectiveConfig, description["objective"])
    objective = OBJECTIVES[config.prediction](config)

    def schedulers(solver: str, **overrides: Any) -> Any:
        """A fresh one of the pipeline's kind, so that none of its state is left over from the image before."""
        own = pipeline.scheduler
        return type(own).from_config(own.config, **overrides)

    objective.schedulers = schedulers
    objective.guided_from = 1.0 if "scheduler" in description else 0.0  # 1 for published weights, as there
    return objective


ADAPTED = "_paradiffusion_adapted"


def remember_adapter(model: Any, adapted: Any) -> None:
    """Note on a language model the PEFT model that has put an adapter into its layers, so that another pipeline that is
    given the same component finds it; outside of torch's own bookkeeping, where it would be a part of its own part."""
    vars(plain(model))[ADAPTED] = adapted


def with_adapter(model: Any) -> Any:
    """The PEFT model noted by ``remember_adapter`` while its adapter is in place, else ``model`` itself."""
    inside = any(".lora_" in name for name, _ in model.named_parameters())
    return vars(plain(model)).get(ADAPTED, model) if inside else model


def plain(model: Any) -> Any:
    """The module that torch.compile has wrapped, or ``model`` itself."""
    return getattr(model, "_orig_mod", model)


def same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether both hold the same names and, in the first one's dtypes, the same values."""
    return first.keys() == second.keys() and all(t.equal(second[n].to(t)) for n, t in first.items())


def hub_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Of ``from_pretrained``'s arguments those that say which files of the hub are meant."""
    keys = ("revision", "cache_dir", "token", "local_files_only")
    return {key: arguments[key] for key in keys if key in arguments}


def local_folder(source: str, patterns: list[str], arguments: dict[str, Any]) -> Path:
    """A pipeline's folder on this machine, with the files of ``patterns`` at least; from the hub where it is no path."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=patterns, **hub_arguments(arguments)))
