"""Write a checkpoint in another layout.

    python scripts/export.py ckpt=runs/paper to=official output=weights          # for the released inference code
    python scripts/export.py ckpt=runs/nano to=pipeline output=pipe              # ParaDiffusionPipeline.from_pretrained("pipe")
    python scripts/export.py ckpt=runs/paper to=lora output=adapters             # for diffusers and PEFT, without frozen models
    python scripts/export.py ckpt=weights to=ours output=checkpoint dtype=float16  # official or pipeline folder -> ours

ckpt= takes a run, a stage, a checkpoint, an official folder (unet=unet_384 chooses one of its U-Nets), a pipeline's folder or hf://USER/NAME.
dtype= is that of the weights on disk: float32, bfloat16 or float16. frozen= says what becomes of the language model and the
autoencoder: copy (default for official and pipeline), link (by a link; in our layout, its default, by path) or none.
text_encoder.path= and codec.path= say where they lie, if not where the checkpoint says.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paradiffusion.checks import one_of
from paradiffusion.compose import compose_options
from paradiffusion.config import DTYPES, option
from paradiffusion.entry import run
from paradiffusion.errors import UserError

LAYOUTS = ("official", "pipeline", "ours", "lora")


@dataclass
class Location:
    """Where a frozen model lies on this machine."""

    path: str | None = None


@dataclass
class ExportOptions:
    """The keys of the command line."""

    ckpt: str | None = None
    to: str | None = option(None, accepts=one_of(*LAYOUTS))
    output: str | None = None
    dtype: str = option("float32", accepts=one_of(*DTYPES))
    frozen: str | None = option(None, accepts=one_of("copy", "link", "none"))
    unet: str = "unet"
    text_encoder: Location = field(default_factory=Location)
    codec: Location = field(default_factory=Location)

    def check(self) -> None:
        for key in ("ckpt", "to", "output"):
            if not getattr(self, key):
                raise UserError(f"{key}= is missing; expected ckpt=<checkpoint> to={'|'.join(LAYOUTS)} output=<folder>.")


def main(arguments: list[str]) -> int:
    """Write the export and say how large it is."""
    options = compose_options(ExportOptions, arguments)
    options.check()
    output = Path(str(options.output)).expanduser()
    from paradiffusion.checkpoints.export import (
        check_absent,
        export_lora,
        export_official,
        export_ours,
        export_pipeline,
        lora_told,
        official_differs,
    )
    from paradiffusion.checkpoints.layouts import find_checkpoint

    check_absent(output)
    checkpoint = find_checkpoint(str(options.ckpt), unet=options.unet)
    checkpoint.place(options.text_encoder.path, options.codec.path)
    write = {"official": export_official, "pipeline": export_pipeline, "ours": export_ours, "lora": export_lora}[str(options.to)]
    write(checkpoint, output, options.dtype, options.frozen or ("link" if options.to == "ours" else "copy"))
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"{output}: {size / 2**20:.1f} MiB in the layout {options.to}")
    if options.to == "lora":
        print(*lora_told(checkpoint), sep="\n")
    if options.to == "official":
        print(*(f"the released code: {reason}." for reason in official_differs(checkpoint, options.dtype)), sep="\n")
    return 0


if __name__ == "__main__":
    run(main, lambda: __doc__ or "")
