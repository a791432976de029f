"""Where model_index.json of pipelines exported before November 2026 looks for the refiner."""

from paradiffusion.sampling.diffusers_pipeline import RefinerModel

__all__ = ["RefinerModel"]
