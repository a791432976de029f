"""A stage's description as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from paradiffusion.budget.describe import Description
from paradiffusion.budget.fit import Advice
from paradiffusion.budget.memory import GIB, LAUNCHES, GpuMemory

TITLES = {launch.name: launch.title for launch in LAUNCHES}
PARTS = {"unet": "U-Net with projection", "refiner": "refiner", "layout": "layout head", "text": "language model",
         "vae": "autoencoder (encode)"}  # fmt: skip


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(f"  {line}".rstrip() for line in lines)


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def size(count: float) -> str:
    """Bytes with a decimal unit, as disks are sold."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def number(count: int) -> str:
    return f"{count / 1e6:,.2f} M" if count < 1e9 else f"{count / 1e9:.3f} B"


def as_text(d: Description) -> str:
    """The whole description."""
    sections = [
        f"preset={d.preset} stage={d.stage}: {d.width}x{d.height} px, {d.tokens} tokens, batch {d.batch_size}, {d.precision}, "
        f"text encoder {d.text_encoder} ({d.train_text})"
        + (", gradient checkpointing" if d.gradient_checkpointing else ""),
        parameters(d),
        flops(d),
        memory(d),
        disk(d),
        speed(d),
    ]
    return "\n\n".join(sections + [advice(entry) for entry in d.advice])


def parameters(d: Description) -> str:
    p = d.parameters
    rows = [("U-Net", p.unet, "no" if p.unet_lora else "yes"), ("text projection", p.projection, "yes"),
            ("U-Net LoRA", p.unet_lora, "yes"), ("refiner", p.refiner, "yes"), ("layout head", p.layout, "yes"),
            ("language model", p.text, "no"), ("LoRA", p.lora, "yes" if d.train_text == "lora" else "no"),
            ("autoencoder", p.vae, "no")]  # fmt: skip
    shown = [(name, number(count), trained) for name, count, trained in rows if count]
    totals = [("total", number(p.total), ""), ("trained", number(p.trained), "")]
    return "Parameters\n" + table([("part", "parameters", "trained"), *shown, *totals])


def flops(d: Description) -> str:
    rows = [("part", "forward", "backward", "recompute", "sum")]
    for name, part in [*d.flops.parts().items(), ("total", d.flops.total())]:
        values = (part.forward, part.backward, part.recompute, part.training + part.recompute)
        if part.forward:
            rows.append((PARTS.get(name, name), *(f"{v / 1e12:.4g}" for v in values)))  # type: ignore[arg-type]
    return "TFLOP per sample (2 x multiply-adds)\n" + table(rows)


def memory(d: Description) -> str:
    head = ("launch", "GPUs", "micro", "weights", "copies", "frozen", "grads", "optim", "EMA", "activ.", "buffers", "context",
            "TOTAL")  # fmt: skip
    if d.gpu is not None:
        head = (*head, f"in {d.gpu:g}?")  # type: ignore[assignment]
    rows = [head]
    for entry in d.memory:
        values = (entry.weights, entry.copies, entry.frozen, entry.gradients, entry.optimizer, entry.ema, entry.activations,
                  entry.buffers, entry.context, entry.total)  # fmt: skip
        row = (TITLES[entry.launch], str(entry.gpus), str(d.micro_batches[entry.launch]), *(gib(v) for v in values))
        rows.append(row if d.gpu is None else (*row, fits(entry, d.gpu)))  # type: ignore[arg-type]
    host = {TITLES[entry.launch]: entry.host for entry in d.memory if entry.host > 0}
    lines = ["GiB per GPU (exact: weights to EMA; estimated: activations, buffers, context)", table(rows)]
    for gpus, micro in {(entry.gpus, d.micro_batches[entry.launch]): None for entry in d.memory}:
        if d.batch_size % (gpus * micro):
            lines.append(
                f"  train.py refuses batch_size={d.batch_size} on {gpus} GPUs: it must be a multiple of {gpus} x "
                f"micro_batch_size={micro}"
            )
    if host:
        lines.append("  and in main memory per process: " + ", ".join(f"{k} {gib(v)}" for k, v in host.items()))
    return "\n".join(lines)


def fits(entry: GpuMemory, gpu: float) -> str:
    return "fits" if entry.total <= gpu * GIB else "no"


def disk(d: Description) -> str:
    rows = [
        ("checkpoint", f"{size(d.checkpoint_whole)}, of which {size(d.checkpoint_weights)} are what sampling needs"),
        ("cached text features", f"{size(d.feature_bytes)} per caption of {d.tokens} tokens in bfloat16, "
         f"{size(1e6 * d.feature_bytes)} per million"),
        ("cached latents", f"{size(d.latent_bytes)} per image in bfloat16, {size(1e6 * d.latent_bytes)} per million"),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    return "Disk\n" + "\n".join(f"  {name.ljust(width)}  {value}" for name, value in rows)


def speed(d: Description) -> str:
    t = d.throughput
    cached = (
        f"; {t.cached_samples_per_second:,.1f} with text features and latents given"
        if t.cached_samples_per_second
        else "; text features cannot be given where the language model is trained"
    )
    lacking = "" if t.half == "bfloat16" or d.precision == "fp32" else f" in {t.half}: it has no bfloat16"
    return (
        f"Time on {t.gpus} x {t.device} ({t.peak_tflops:g} TFLOP/s each at its data sheet{lacking}) at {t.mfu:.0%} of that:\n"
        f"  {t.samples_per_second:,.1f} samples/s{cached}\n  {d.max_steps:,} steps of {d.batch_size}: {duration(t.days)}"
    )


def duration(days: float) -> str:
    if days >= 1:
        return f"{days:,.1f} days"
    return f"{days * 24:.1f} hours" if days * 24 >= 1 else f"{days * 1440:.1f} minutes"


def advice(entry: Advice) -> str:
    lines = [f"{TITLES[entry.launch]} needs {gib(entry.needed)} GiB of {gib(entry.available)}. One change alone:"]
    rows = [
        (
            change.override,
            f"saves {gib(change.saves)}",
            f"leaves {gib(change.total)}",
            "fits" if change.fits else "does not fit",
        )
        for change in entry.changes
    ]
    lines.append(table(rows) if rows else "  none of the keys saves anything.")
    if len(entry.together) > 1:
        verdict = "fits" if entry.fits else "still does not fit"
        lines.append(f"  together: {' '.join(entry.together)} -> {gib(entry.total)}, which {verdict}.")
    return "\n".join(lines)
