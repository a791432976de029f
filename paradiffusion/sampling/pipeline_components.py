"""What the diffusers pipeline adds to our modules: a refiner that it can save, and its scheduler as our objective takes it."""

from __future__ import annotations

from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from paradiffusion.config import ObjectiveConfig
from paradiffusion.models.official import ScheduledObjective
from paradiffusion.text.refiner import Refiner


class RefinerModel(ModelMixin, ConfigMixin):
    """The refiner as a component that a pipeline saves and loads; see ``paradiffusion.text.refiner.Refiner``."""

    @register_to_config
    def __init__(self, input_width: int, width: int, layers: int, heads: int, kernel: int = 0, layout: int = 0) -> None:
        super().__init__()
        self.refiner = Refiner(input_width, width, layers, heads, kernel, layout)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """As ``Refiner.forward``."""
        refined: Tensor = self.refiner(features, mask)
        return refined


class PipelineObjective(ScheduledObjective):
    """The checkpoint's objective, sampled by whatever scheduler the pipeline has now."""

    def __init__(self, config: ObjectiveConfig, pipeline: Any) -> None:
        self.config = config
        self.pipeline = pipeline
        if config.prediction != "flow":
            self.alphas_cumprod = pipeline.scheduler.alphas_cumprod.float()

    def scheduler(self, solver: str = "dpm", **overrides: Any) -> Any:
        """A fresh one of the pipeline's kind, so that none of its state is left over from the image before."""
        own = self.pipeline.scheduler
        return type(own).from_config(own.config, **overrides)
