"""The model card of a checkpoint that is pushed to a hub: what it is, needs, was trained on and scored, with samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

from paradiffusion.checkpoints.export import SAMPLES
from paradiffusion.checkpoints.layouts import Layout, open_layout, read_json
from paradiffusion.evaluation.drawing.checkpoint_pictures import weights_hash
from paradiffusion.evaluation.records import NAME, read_evaluation
from paradiffusion.evaluation.reporting.numbers import suite_numbers
from paradiffusion.evaluation.reporting.report_tables import score_grid
from paradiffusion.evaluation.subjects import ELSEWHERE, SUITE
from paradiffusion.models.unet import class_of
from paradiffusion.pages import grid_markdown, markdown, markdown_table
from paradiffusion.sampling.gallery import is_whole, read_manifests
from paradiffusion.scenes.alignment import alignment_table

TEMPLATE = Path(__file__).parents[1] / "templates" / "model_card.md"
MOST_SAMPLES = 8


def write_card(
    folder: Path, checkpoint: Layout, hub: str, licence: str | None = None, data: str | None = None, samples: Path | None = None
) -> str:  # fmt: skip
    """Write README.md and the samples that it shows into ``folder``, which holds the ``checkpoint``'s export; the card's text.

    Args:
        hub: USER/NAME.
        licence: of the weights, by the hub's identifier (apache-2.0).
        data: what it was trained on; None for the names in its run's config.json.
        samples: a folder of sample.py's, of which the first pictures by this checkpoint are shown.
    """
    description = open_layout(folder).description  # says nothing of this machine
    frozen = {part: description[key] for part, key in (("text encoder", "text_encoder"), ("autoencoder", "codec"))}
    stage = checkpoint.folder.parent.parent if checkpoint.folder.parent.name == "checkpoints" else None
    card = ModelCard.from_template(
        ModelCardData(
            license=licence, pipeline_tag="text-to-image", tags=["paradiffusion"],
            base_model=[model["hub"] for model in frozen.values() if model.get("hub")] or None,
        ),
        str(TEMPLATE), name=hub.partition("/")[2], hub=hub, licence=licence,
        needs=[(part, model["hub"] or model["name"], _where(model)) for part, model in frozen.items()],
        table=markdown_table(["setting", "value"], [[name, markdown(text)] for name, text in _settings(checkpoint, description)]),
        data=markdown(data or _data(stage)), scores=list(_scores(checkpoint, stage)),
        samples=_samples(checkpoint, samples, folder) if samples else "",
    )  # fmt: skip
    (folder / "README.md").write_text(text := str(card), encoding="utf-8")
    return text


def _where(model: dict[str, Any]) -> str:
    if model.get("hub"):
        return "fetched from the hub when it is used"
    if model.get("package"):
        return f"in the Python package `{model['package']}`"
    return "which comes with ParaDiffusion" if model.get("path") or model["name"] == "tiny" else "to be given by its path"


def _settings(checkpoint: Layout, description: dict[str, Any]) -> Iterator[tuple[str, str]]:
    conditioning, objective, sampler = (description[key] for key in ("conditioning", "objective", "sampler"))
    numbers = sum(tensor.numel() for tensor in checkpoint.weights().values())
    yield "denoiser", f"{class_of(checkpoint.unet_config)}, trained at {description['resolution']} pixels"
    yield "parameters of these weights", f"{numbers / 1e6:,.1f} million"
    yield "preset, stage, step", f"{description['preset']}, {description['stage']}, {description['step']:,}"
    yield "conditioning", f"{conditioning['name']}, up to {conditioning['max_tokens']} tokens"
    yield "adapter of the text encoder", f"rank {lora['rank']}" if (lora := description["lora"]) else "none"
    yield "objective", f"{objective['name']}, {objective['prediction']}"
    yield "sampler", f"{sampler['solver']}, {sampler['steps']} steps, guidance {sampler['guidance']:g}"
    if start := checkpoint.description["provenance"].get("init_from"):
        yield "started from", start if start.startswith("hf://") else PurePosixPath(start).name
    if seen := description["provenance"].get("images_seen"):
        yield "images seen", f"{seen:,}"


def _data(stage: Path | None) -> str:
    """The sets of a stage by name: no paths, which say more of a machine than of a set."""
    if stage is None or not (stage / "config.json").is_file():
        return "It was not recorded with these weights."
    data = read_json(stage / "config.json")["data"]
    if data["demo"]:
        return f"Built-in scenes: the set {data['demo_set']} of the {data['world']} world."
    names = []
    for source in data["sources"] or [data]:
        given = source["folder"] or source["shards"]
        paths = [PurePosixPath(str(one)) for one in (given if isinstance(given, list) else [given])]
        ends = dict.fromkeys(path.parent.name if path.suffix == ".tar" else path.name for path in paths)
        names.append(source.get("name") or ", ".join(ends))
    return f"Sets: {'; '.join(names)}."


def _scores(checkpoint: Layout, stage: Path | None) -> Iterator[tuple[str, str]]:
    """Title and table of all that was measured on these very weights: at the end of their stage, and by scripts/evaluate.py."""
    if stage and (stage / "summary.json").is_file():
        summary = read_json(stage / "summary.json")
        if summary["steps"] == checkpoint.description["step"]:
            losses = [[name, f"{value:.4f}"] for name, value in summary["validation"].items()]
            if losses:
                yield "Held-out samples", markdown_table(["measure", "value"], losses, 1)
            if summary["alignment"]:
                yield "Held-out scenes", alignment_table(f"stage {summary['stage']}", summary["alignment"])
    weights = weights_hash(checkpoint.folder)
    for base in [stage / "evaluation", ELSEWHERE] if stage else [ELSEWHERE]:
        for path in sorted([*base.glob(f"*/{SUITE}"), *base.glob(f"*/*/{SUITE}")]):
            if read_json(path).get("weights") == weights and (path.parent / NAME).is_file():
                evaluation = read_evaluation(path.parent)
                drawn = evaluation.source.get("settings") or {}
                how = f"{drawn['steps']} steps, guidance {drawn['guidance']:g}" if drawn else "drawn as is"
                (numbers,) = suite_numbers([evaluation])
                yield f"{markdown(numbers.suite.title)} ({how})", grid_markdown(score_grid(numbers))


def _samples(checkpoint: Layout, samples: Path, folder: Path) -> str:
    """Copy the pictures, and the table that shows them."""
    name, step = Path(checkpoint.name).resolve(), checkpoint.description["step"]
    rows: list[list[str]] = []
    for record in read_manifests(samples).values() if samples.is_dir() else ():
        if (Path(record.checkpoint).resolve(), record.step) != (name, step) or not is_whole(samples, record):
            continue
        if len(rows) == MOST_SAMPLES:
            break
        target = folder / SAMPLES / record.file
        target.parent.mkdir(exist_ok=True)
        with Image.open(samples / record.file) as image:
            image.convert("RGB").save(target, pnginfo=None)  # without its text, which has paths of this machine
        drawn = record.settings
        how = f"seed {record.seed}, {drawn.get('steps')} steps, guidance {drawn.get('guidance')}, {record.width} x {record.height}"
        rows.append([f"![{record.name}]({SAMPLES}/{record.file})", markdown(record.prompt), how])
    return markdown_table(["picture", "paragraph", "drawn with"], rows) if rows else ""
