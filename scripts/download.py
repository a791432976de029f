"""Fetch what the paper's preset needs from the hub, and say where suites of prompts come from.

    python scripts/download.py what=all dry_run=true            # sizes and licences, nothing is fetched
    python scripts/download.py what=llm yes=true                # to the hub's cache, where text_encoder=llama2_7b looks
    python scripts/download.py what=official to=weights         # to weights/official, for sample.py ckpt=weights/official
    python scripts/download.py what=paraprompts                 # where it is, its size and licence, the commands; is it here?
    python scripts/download.py what=paraprompts check=folder    # are these the released files?

what= is llm, vae, official or all; id= and revision= choose another repository of the hub for one of them. Without yes=true
a terminal is asked. Log in with `hf auth login` for what has a gate. what= is also a suite of configs/suites.yaml
(what=suites lists them), whose files are never fetched from here: most have no licence, so you fetch them, and check= (or
to=) tells whether they are the right ones; allow_other=true accepts others and says what they hold.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paradiffusion.checks import choice
from paradiffusion.compose import compose_options
from paradiffusion.entry import run
from paradiffusion.errors import UserError
from paradiffusion.evaluation.suites.load import load_suite, suites
from paradiffusion.evaluation.suites.suite_table import Expected, read_table, suite_list, what_it_holds, where_from


@dataclass(frozen=True)
class Item:
    """Something on the hub.

    Attributes:
        gigabytes: of what is fetched; licence: as its page says; patterns: files to fetch.
    """

    what: str
    hub: str
    gigabytes: float
    licence: str
    patterns: tuple[str, ...]


CONFIGURATION = ("*.json", "*.model", "*.txt", "LICENSE*", "USE_POLICY*", "README.md")
# Sizes and licences as their pages on the hub gave them.
ITEMS = (
    Item(
        "llm", "meta-llama/Llama-2-7b-hf", 13.5,
        "Llama 2 Community License: not open source, and behind a gate that you must pass on its page",
        ("*.safetensors", *CONFIGURATION),
    ),
    Item(
        "vae", "madebyollin/sdxl-vae-fp16-fix", 0.33, "MIT",
        ("diffusion_pytorch_model.safetensors", "config.json", "README.md"),
    ),
    Item(
        "official", "weijiawu/ParaDiffusion", 38.5,
        "its card says Apache-2.0, its authors' code repository publishes none; it holds a copy of Llama 2, whose own licence "
        "(Llama 2 Community License) goes on to hold",
        ("*.safetensors", "*.bin", *CONFIGURATION),
    ),
)  # fmt: skip


@dataclass
class DownloadOptions:
    """The keys of the command line."""

    what: str | None = None
    to: str | None = None
    id: str | None = None
    revision: str | None = None
    dry_run: bool = False
    yes: bool = False
    check: str | None = None
    allow_other: bool = False

    def checked(self) -> None:
        """UserError for keys that do not go together."""
        if self.what is None:
            raise UserError("what= is missing; expected what=llm|vae|official|all|<a suite>, see --help.")
        choice("what", self.what, (*(item.what for item in ITEMS), "all", "suites", *suites()))
        if self.check is not None and self.what not in suites():
            raise UserError(f"check={self.check} needs the suite that it should be; add what=<suite> (what=suites lists them).")
        if self.what == "all" and (self.id or self.revision):
            raise UserError("id= and revision= choose one repository; name it with what=llm, vae or official.")


def main(arguments: list[str]) -> int:
    """Fetch what ``arguments`` name; the exit status."""
    options = compose_options(DownloadOptions, arguments)
    options.checked()
    if options.what == "suites":
        print(suite_list())
        return 0
    if options.what in suites():
        return look_at_suite(options.what, options.check or options.to, options.allow_other)
    chosen = [item for item in ITEMS if options.what in (item.what, "all")]
    for item in chosen:
        size = f"about {item.gigabytes:g} GB" if options.id is None else "of unknown size"
        licence = item.licence if options.id is None else "as its page says"
        print(f"{item.what}: {options.id or item.hub}, {size}, to {target_of(item, options) or 'the hub cache'}")
        print(f"  licence: {licence}")
    if options.dry_run:
        return 0
    confirm(options)
    for item in chosen:
        print(f"{item.what}: {fetch(item, options)}", flush=True)
    return 0


def look_at_suite(name: str, path: str | None, allow_other: bool) -> int:
    """Say where a suite comes from, and whether the files at ``path``, or where it is looked for, are the released ones."""
    entry = read_table()[name]
    place = path or entry.path
    if path is None:
        print(where_from(entry))
    if path is None and place and not Path(place).expanduser().exists():
        print(f"  it is not in {place} yet.")
        return 0
    print(what_it_holds(load_suite(name, path, allow_other=allow_other)))
    if allow_other or entry.expected == Expected():
        print("  read as they are; nothing was compared with the released files.")
    else:
        print(f"  {place}: these are the released files, by all that is known of them.")
    return 0


def target_of(item: Item, options: DownloadOptions) -> Path | None:
    """The folder below ``to=``; None for the hub's cache, where the configurations look."""
    return Path(options.to).expanduser() / item.what if options.to else None


def confirm(options: DownloadOptions) -> None:
    """UserError unless the person agrees."""
    if options.yes:
        return
    if not sys.stdin.isatty():
        raise UserError("nobody is there to agree to sizes and licences; add yes=true.")
    if input("fetch this? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("nothing was fetched.")


def fetch(item: Item, options: DownloadOptions) -> Path:
    """Download one item; what is there already is not fetched again. Returns its folder."""
    from huggingface_hub import snapshot_download

    hub, target = options.id or item.hub, target_of(item, options)
    place = {"revision": options.revision, "local_dir": target and str(target)}
    try:
        folder = Path(snapshot_download(hub, allow_patterns=list(item.patterns), **place))
        # An older repository, such as T5's, has its weights in .bin alone.
        if "*.bin" not in item.patterns and not any(folder.rglob("*.safetensors")):
            snapshot_download(hub, allow_patterns=["*.bin"], **place)
        return folder
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        gated = any(word in str(error).lower() for word in ("gated", "401", "403"))
        advice = "accept its licence on its page and log in with `hf auth login`" if gated else "try again: it goes on"
        raise UserError(f"{hub} could not be fetched ({reason.rstrip('.')}); {advice}.") from None


if __name__ == "__main__":
    run(main, lambda: __doc__ or "")
