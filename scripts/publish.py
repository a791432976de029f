"""Give a checkpoint away: a copy without its training state, in a folder or on a hub with a model card.

    python scripts/publish.py ckpt=runs/nano output=data/nano [dtype=bfloat16] [resolution=64]
    python scripts/publish.py ckpt=runs/nano hub=USER/NAME dry_run=true       # every file that would go, its size, and the card
    python scripts/publish.py ckpt=runs/nano hub=USER/NAME licence=apache-2.0 [private=true]
    python sample.py ckpt=hf://USER/NAME prompt="..."                         # on any machine

Weights are the EMA weights; text encoder and codec are recorded by name and hash, not copied, so a language model never goes
along, whatever layout ckpt= has. The card is made of the checkpoint's settings, its scores (the stage's and those of
scripts/evaluate.py), the names of its training sets (data="..." says it in words), licence=, and the first pictures that sample.py
drew from it into samples= (where sample.py puts them by itself). resolution= is that at which it draws by default, of several
that it was trained at. Log in first with `hf auth login`, or set HF_TOKEN. `--ckpt runs/nano` is the same as ckpt=runs/nano.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paradiffusion.checks import one_of, positive
from paradiffusion.compose import compose_options
from paradiffusion.config import DTYPES, SampleConfig, option
from paradiffusion.entry import run
from paradiffusion.errors import UserError


@dataclass
class PublishOptions:
    """The keys of the command line."""

    ckpt: str | None = None
    output: str | None = None
    dtype: str = option("float32", accepts=one_of(*DTYPES))
    resolution: int | None = option(None, accepts=positive)
    hub: str | None = None
    licence: str | None = None
    data: str | None = None
    samples: str | None = None
    private: bool = False
    dry_run: bool = False

    def check(self) -> None:
        from huggingface_hub import get_token

        from paradiffusion.checkpoints.hub import LOG_IN, REPOSITORY

        if not self.ckpt or not (self.output or self.hub):
            raise UserError("expected ckpt=<checkpoint>, and output=<folder> or hub=USER/NAME; see --help.")
        if self.hub and not REPOSITORY.fullmatch(self.hub):
            raise UserError(f"hub={self.hub} names no repository; expected hub=USER/NAME.")
        if self.dry_run and not self.hub:
            raise UserError("dry_run=true shows what would go to a hub; add hub=USER/NAME.")
        if self.hub and not self.dry_run and get_token() is None:
            raise UserError(f"hub={self.hub} needs a token, and there is none; {LOG_IN}, or look first with dry_run=true.")


def main(arguments: list[str]) -> int:
    """Write the published checkpoint, push it where it is wanted, and say how large it is."""
    options = compose_options(PublishOptions, as_keys(arguments))
    options.check()
    from paradiffusion.checkpoints.export import export_ours, files_of, push
    from paradiffusion.checkpoints.layouts import find_checkpoint

    checkpoint = find_checkpoint(str(options.ckpt))
    if options.resolution is not None:
        checkpoint.description["resolution"] = options.resolution
    with TemporaryDirectory() as temporary:
        kept = options.output and not options.dry_run
        folder = Path(str(options.output)).expanduser() if kept else Path(temporary, "checkpoint")
        export_ours(checkpoint, folder, options.dtype, frozen="none")
        if options.hub:
            from paradiffusion.evaluation.reporting.model_card import write_card
            from paradiffusion.sampling.run import output_folder

            samples = Path(options.samples or output_folder(SampleConfig(ckpt=options.ckpt))).expanduser()
            card = write_card(folder, checkpoint, options.hub, options.licence, options.data, samples)
        sizes = {name: path.stat().st_size for name, path in files_of(folder).items()}
        whole = f"{sum(sizes.values()) / 2**20:.1f} MiB"
        if options.dry_run:
            print(*(f"{size:>14,}  {name}" for name, size in sizes.items()), sep="\n")
            print(f"{whole} would go to {options.hub}, with this card as README.md:\n\n{card}")
        elif options.hub:
            print(f"{push(folder, options.hub, options.private)}: {whole}; python sample.py ckpt=hf://{options.hub}")
        else:
            print(f"{options.output}: {whole}")
    return 0


def as_keys(arguments: list[str]) -> list[str]:
    """``--key value`` and ``--key=value``, as this command was typed before, as key=value."""
    found, words = [], iter(arguments)
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--"):
            key = key.replace("-", "_")
            value = value if equals else "true" if key in ("dry_run", "private") else next(words, "")
            word = f"{key}={value}"
        found.append(word)
    return found


if __name__ == "__main__":
    run(main, lambda: __doc__ or "")
