"""Whether a stage fits into a GPU, and which key to change where it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from paradiffusion.budget.empty import empty_models
from paradiffusion.budget.memory import (
    LAUNCHES,
    Activations,
    Counts,
    GpuMemory,
    LaunchBytes,
    count_parameters,
    gpu_memory,
    measure_encoding,
    measure_reading,
    measure_training,
)
from paradiffusion.config import TrainConfig

# Below this a change is not worth a line: the estimate is not that good.
SMALLEST_SAVING = 64 * 2**20


@dataclass(frozen=True)
class Change:
    """One override, what it saves by itself, and what is then needed; bytes."""

    override: str
    saves: float
    total: float
    fits: bool


@dataclass(frozen=True)
class Advice:
    """For a launch that does not fit: single changes, the most saving first, and the fewest of them that fit together.

    Attributes:
        together: overrides; empty where one suffices, or where not even all of them do.
        total: bytes with ``together``, or with all of them.
    """

    launch: str
    needed: float
    available: float
    changes: list[Change]
    together: list[str]
    total: float
    fits: bool


class Fitter:
    """Memory of a stage and of its variants; each is measured once.

    Args:
        arguments: overrides of train.py; ``compose`` makes a configuration of them.
        gpus: of the launches for several.
    """

    def __init__(self, arguments: list[str], compose: Callable[[list[str]], TrainConfig], gpus: int) -> None:
        self.arguments, self.compose, self.gpus = arguments, compose, gpus
        self._configs: dict[tuple[str, ...], TrainConfig] = {}
        self._counts: dict[str, Counts] = {}
        self._peaks: dict[tuple[object, ...], int] = {}

    def config(self, *overrides: str) -> TrainConfig:
        """The stage with overrides in the place of those of the same keys."""
        if overrides not in self._configs:
            keys = {override.partition("=")[0] for override in overrides}
            kept = [a for a in self.arguments if a.partition("=")[0] not in keys]
            self._configs[overrides] = self.compose(kept + list(overrides))
        return self._configs[overrides]

    def counts(self, config: TrainConfig) -> Counts:
        key = repr(
            (config.text_encoder, config.conditioning, config.lora, config.unet, config.codec, config.train_text)
        )
        if key not in self._counts:
            self._counts[key] = count_parameters(empty_models(config))
        return self._counts[key]

    def micro_batch(self, config: TrainConfig, launch: LaunchBytes) -> int:
        """Samples that one process takes at once."""
        return config.micro_batch_size or max(1, config.batch_size // (self.gpus if launch.several else 1))

    def memory(self, launch: LaunchBytes, *overrides: str) -> GpuMemory:
        """Bytes on a GPU of the stage with ``overrides``."""
        config = self.config(*overrides)
        gpus = self.gpus if launch.several else 1
        activations = self.activations(config, self.micro_batch(config, launch))
        return gpu_memory(launch, gpus, config, self.counts(config), activations)

    def activations(self, config: TrainConfig, micro_batch: int) -> Activations:
        """Each of the three peaks is measured once for all configurations in which it is the same."""

        def once(measure: Callable[[TrainConfig, int], int], *depends_on: object) -> int:
            key = (measure.__name__, micro_batch, repr(depends_on))
            if key not in self._peaks:
                self._peaks[key] = measure(config, micro_batch)
            return self._peaks[key]

        # A 4-bit language model computes in its dtype: what it keeps for the way back is the same.
        text = (replace(config.text_encoder, quantization=None), config.conditioning, config.lora, config.train_text)
        sizes = (config.codec, config.data.resolution, config.data.bucket_multiple, config.data.max_aspect)
        rest = (config.unet, config.objective, config.precision, config.gradient_checkpointing)
        return Activations(
            encode_images=once(measure_encoding, sizes),
            read_text=once(measure_reading, text),
            train=once(measure_training, text, sizes, rest),
        )

    def advise(self, available: float) -> list[Advice]:
        """One entry for each launch that needs more than ``available`` bytes."""
        found = []
        for launch in LAUNCHES:
            needed = self.memory(launch).total
            if needed > available:
                found.append(self._advise(launch, needed, available))
        return found

    def _advise(self, launch: LaunchBytes, needed: float, available: float) -> Advice:
        changes = []
        for override in self.candidates(launch):
            total = self.memory(launch, override).total
            if needed - total > SMALLEST_SAVING:
                changes.append(Change(override, needed - total, total, total <= available))
        if launch.name != "zero2_offload":
            other = self.memory(next(item for item in LAUNCHES if item.name == "zero2_offload")).total
            if needed - other > SMALLEST_SAVING:
                path = "--config_file configs/launch/zero2_offload.yaml"
                changes.append(Change(path, needed - other, other, other <= available))
        changes.sort(key=lambda change: -change.saves)
        together: list[str] = []
        total = needed
        # Another launch is a different table row, a recipe a set of these, and a lower resolution another training.
        apart = ("--config_file", "recipe=", "data.resolution=")
        for change in changes:
            if total <= available or change.override.startswith(apart):
                continue
            together.append(change.override)
            total = self.memory(launch, *together).total
        return Advice(launch.name, needed, available, changes, together, total, total <= available)

    def candidates(self, launch: LaunchBytes) -> list[str]:
        """Overrides that may save memory in this stage."""
        config = self.config()
        deepspeed = launch.name.startswith("zero")
        multiple = config.data.bucket_multiple
        lower = config.data.resolution // 2 // multiple * multiple
        possible = {
            "micro_batch_size=1": self.micro_batch(config, launch) > 1,
            "gradient_checkpointing=true": not config.gradient_checkpointing,
            "ema_device=cpu": config.ema_device is None,
            "text_encoder.quantization=4bit": config.text_encoder.quantization is None and not deepspeed,
            # DeepSpeed's optimisers are its own.
            "optimizer.name=adamw8bit": config.optimizer.name == "adamw" and not deepspeed,
            "unet.lora_rank=32": config.unet.lora_rank == 0,
            "recipe=24gb": config.recipe == "none" and config.preset == "paper" and config.stage > 1 and not deepspeed,
            f"data.resolution={lower}": lower >= multiple,
        }
        return [override for override, is_possible in possible.items() if is_possible]
