"""The cost of a stage before anything is trained: parameters, FLOP, memory for each launch, disk, time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from paradiffusion.budget.empty import empty_models
from paradiffusion.budget.flops import DEVICES, StageFlops, stage_flops
from paradiffusion.budget.memory import GIB, LAUNCHES, Advice, Counts, Fitter, GpuMemory, checkpoint_bytes
from paradiffusion.checks import one_of, positive
from paradiffusion.compose import split_options
from paradiffusion.config import TrainConfig, option
from paradiffusion.errors import UserError

TITLES = {launch.name: launch.title for launch in LAUNCHES}
PARTS = {"unet": "U-Net with projection", "refiner": "refiner", "layout": "layout head", "text": "language model",
         "vae": "autoencoder (encode)", "teacher": "teacher"}  # fmt: skip


@dataclass
class Question:
    """What scripts/describe.py is asked beside the stage; it says what each key is."""

    gpu: float | None = option(None, accepts=positive)
    format: str = option("text", accepts=one_of("text", "json"))
    gpus: int = option(8, accepts=positive)
    mfu: float = option(0.4, accepts=positive)
    device: str = option("h100", accepts=one_of(*DEVICES))
    price: float | None = option(None, accepts=positive)
    beside: str | None = option(None, typed="text")


@dataclass(frozen=True)
class Throughput:
    """What to expect of ``gpus`` devices at a share ``mfu`` of their peak: samples per second with the language model and the autoencoder
    run in every step, as training does, and ``cached``, with features and latents given (None where the language model is trained); and
    days for the stage's max_steps, in the first way, with their ``gpu_hours`` and what those cost at the price asked with."""

    device: str
    half: str
    peak_tflops: float
    gpus: int
    mfu: float
    samples_per_second: float
    cached_samples_per_second: float | None
    days: float
    gpu_hours: float
    money: float | None


@dataclass(frozen=True)
class Recomputation:
    """The least of it with which a launch fits, as overrides; then needed ``total`` bytes, and ``flops`` of a sample where the stage as it
    stands computes ``now``."""

    launch: str
    override: str
    total: float
    flops: float
    now: float

    @property
    def speed_up(self) -> float:
        """By arithmetic, at the same share of the device's peak."""
        return self.now / self.flops


@dataclass(frozen=True)
class Description:
    """Everything that describe says; bytes, FLOP per sample, seconds."""

    config: TrainConfig
    height: int
    width: int
    tokens: int
    parameters: Counts
    flops: StageFlops
    memory: list[GpuMemory]
    micro_batches: dict[str, int]
    feature_bytes: int
    latent_bytes: int
    checkpoint_weights: int
    checkpoint_whole: int
    throughput: Throughput
    gpu: float | None
    advice: list[Advice]
    recomputation: list[Recomputation]

    def as_json(self) -> dict[str, Any]:
        """One document: the fields, with totals beside them."""
        document = asdict(self)
        config = document.pop("config")
        for row, memory in zip(document["memory"], self.memory, strict=True):
            row["total"] = memory.total
            row["fits"] = None if self.gpu is None else memory.total <= self.gpu * GIB
        document["parameters"]["total"] = self.parameters.total
        total = self.flops.total()
        document["flops"]["total"] = {**asdict(total), "training": total.training}
        document["recomputation"] = [
            {**row, "speed_up": r.speed_up} for row, r in zip(document["recomputation"], self.recomputation, strict=True)
        ]
        shown = ("preset", "stage", "batch_size", "max_steps", "precision", "gradient_checkpointing", "train_text")
        return {**{key: config[key] for key in shown}, "text_encoder": self.config.text_encoder.name, **document}


def parse_question(arguments: Sequence[str]) -> tuple[Question, list[str]]:
    """Split describe's own keys from the overrides of train.py; UserError for a value that makes no sense."""
    question, rest = split_options(Question, arguments)
    if question.mfu > 1:
        raise UserError(f"mfu={question.mfu} is out of range; expected a share above 0 and up to 1.")
    if not any(argument.startswith(("data.shards=", "data.sources=", "data.folder=")) for argument in rest):
        rest.append("data.shards=unused")  # presets for one's own data have no default, and none is read here
    return question, rest


def describe(arguments: Sequence[str], question: Question) -> Description:
    """Count a stage from overrides of train.py, without weights or data. UserError for overrides that are wrong or make no models."""
    fitter = Fitter(list(arguments), question.gpus)
    config = fitter.config()
    models, flops, counts = empty_models(config), stage_flops(config), fitter.counts(config)
    weights, whole = checkpoint_bytes(config, counts)
    channels, rows, columns = models.codec.latent_shape(models.height, models.width)
    return Description(
        config=config,
        height=models.height,
        width=models.width,
        tokens=models.tokens,
        parameters=counts,
        flops=flops,
        memory=[fitter.memory(launch) for launch in fitter.launches()],
        micro_batches={launch.name: fitter.micro_batch(config, launch) for launch in fitter.launches()},
        feature_bytes=2 * models.tokens * models.text.width,
        latent_bytes=2 * 2 * channels * rows * columns,  # mean and standard deviation
        checkpoint_weights=weights,
        checkpoint_whole=whole,
        throughput=throughput(config, flops, question),
        gpu=question.gpu,
        advice=[] if question.gpu is None else fitter.advise(question.gpu * GIB),
        recomputation=[] if question.gpu is None else least_recomputation(fitter, question.gpu * GIB, flops),
    )


def least_recomputation(fitter: Fitter, available: float, flops: StageFlops) -> list[Recomputation]:
    """For each launch of a stage that recomputes, what fits into ``available`` bytes with a twentieth to spare: none of it, none with half
    the micro-batch, or, of a language model that is trained, every second layer."""
    config, found = fitter.config(), []
    for launch in fitter.launches() if config.gradient_checkpointing else ():
        micro = fitter.micro_batch(config, launch)
        ways = ["gradient_checkpointing=false"]
        ways += [f"gradient_checkpointing=false micro_batch_size={micro // 2}"] * (micro % 2 == 0)
        ways += ["gradient_checkpointing=half"] * (config.train_text == "lora" and config.gradient_checkpointing != "half")
        for way in ways:
            total = fitter.memory(launch, *way.split()).total
            if total <= 0.95 * available:
                now, then = flops.total(), stage_flops(fitter.config(*way.split())).total()
                found.append(Recomputation(launch.name, way, total, then.training + then.recompute, now.training + now.recompute))
                break
    return found


def throughput(config: TrainConfig, flops: StageFlops, question: Question) -> Throughput:
    """Samples per second where the devices compute at ``mfu`` of their peak, recomputation counted as work."""
    device = DEVICES[question.device]
    peak = device.peak(config.precision)
    speed = question.gpus * peak * 1e12 * question.mfu

    def rate(*left_out: str) -> float:
        total = flops.total(*left_out)
        return speed / (total.training + total.recompute)

    cached = rate("text", "vae") if config.train_text != "lora" else None
    days = config.max_steps * config.batch_size / rate() / 86400
    hours = days * 24 * question.gpus
    money = None if question.price is None else hours * question.price
    return Throughput(device.title, device.half, peak, question.gpus, question.mfu, rate(), cached, days, hours, money)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns, the first column to the left and the others to the right."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = ([row[0].ljust(first), *map(str.rjust, row[1:], others)] for row in rows)
    return "\n".join("  " + "  ".join(cells).rstrip() for cells in lines)


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
    """The description as tables for a terminal."""
    c = d.config
    head = (
        f"preset={c.preset} stage={c.stage}: {d.width}x{d.height} px, {d.tokens} tokens, batch {c.batch_size}, {c.precision}, "
        f"text encoder {c.text_encoder.name} ({c.train_text})"
        + {True: ", gradient checkpointing", "half": ", half of its layers recomputed"}.get(c.gradient_checkpointing, "")
    )
    return "\n\n".join([head, parameters(d), flops(d), memory(d), disk(d), speed(d), *map(advice, d.advice)])


def side_by_side(described: Sequence[Description]) -> str:
    """What the same stage costs with one conditioning and with another, a column each."""
    names: dict[str, Callable[[Description], str]] = {
        "": lambda d: f"conditioning={d.config.conditioning.name}",
        "refiner, width": lambda d: str(d.config.conditioning.refiner_width) if d.parameters.refiner else "none",
        "refiner": lambda d: number(d.parameters.refiner),
        "trained": lambda d: number(d.parameters.trained),
        "TFLOP per sample, refiner": lambda d: f"{d.flops.refiner.training / 1e12:.4g}",
        "TFLOP per sample": lambda d: f"{((total := d.flops.total()).training + total.recompute) / 1e12:.4g}",
        "GiB on one GPU": lambda d: gib(d.memory[0].total),
        "samples/s": lambda d: f"{d.throughput.samples_per_second:,.1f}",
    }
    title = f"Side by side, every caption as long as the longest ({described[0].tokens} tokens)"
    return title + "\n" + table([(name, *map(shown, described)) for name, shown in names.items()])


def parameters(d: Description) -> str:
    p = d.parameters
    rows = [("U-Net", p.unet, not p.unet_lora), ("text projection", p.projection, True), ("U-Net LoRA", p.unet_lora, True),
            ("refiner", p.refiner, not d.config.objective.distill_steps), ("layout head", p.layout, not d.config.objective.distill_steps),
            ("language model", p.text, False),
            ("LoRA", p.lora, d.config.train_text == "lora"), ("autoencoder", p.vae, False)]  # fmt: skip
    shown = [(name, number(count), "yes" if trained else "no") for name, count, trained in rows if count]
    totals = [("total", number(p.total), ""), ("trained", number(p.trained), "")]
    return "Parameters\n" + table([("part", "parameters", "trained"), *shown, *totals])


def flops(d: Description) -> str:
    rows = [["part", "forward", "backward", "recompute", "sum"]]
    for name, part in [*d.flops.parts().items(), ("total", d.flops.total())]:
        values = (part.forward, part.backward, part.recompute, part.training + part.recompute)
        if part.forward:
            rows.append([PARTS.get(name, name), *(f"{v / 1e12:.4g}" for v in values)])
    return "TFLOP per sample (2 x multiply-adds)\n" + table(rows)


def memory(d: Description) -> str:
    rows = [["launch", "GPUs", "micro", "weights", "copies", "frozen", "grads", "optim", "EMA", "activ.", "buffers", "context",
             "TOTAL"]]  # fmt: skip
    for m in d.memory:
        parts = [value for name, value in vars(m).items() if name not in ("launch", "gpus", "host")]
        rows.append([TITLES[m.launch], str(m.gpus), str(d.micro_batches[m.launch]), *map(gib, [*parts, m.total])])
    if d.gpu is not None:
        fits = ["fits" if m.total <= d.gpu * GIB else "no" for m in d.memory]
        rows = [[*row, cell] for row, cell in zip(rows, [f"in {d.gpu:g}?", *fits], strict=True)]
    lines = ["GiB per GPU (exact: weights to EMA; estimated: activations, buffers, context)", table(rows)]
    if refused := sorted({m.gpus for m in d.memory if d.config.batch_size % m.gpus}):
        lines.append(f"  train.py refuses batch_size={d.config.batch_size} on {refused[0]} GPUs: it must be a multiple of them")
    if host := ", ".join(f"{TITLES[m.launch]} {gib(m.host)}" for m in d.memory if m.host > 0):
        lines.append(f"  and in main memory per process: {host}")
    for override in dict.fromkeys(r.override for r in d.recomputation):
        fitting = [r for r in d.recomputation if r.override == override]
        told = ", ".join(f"{TITLES[r.launch]} {gib(r.total)}" for r in fitting)
        lines.append(
            f"  less recomputation fits by {override} ({told}): {fitting[0].flops / 1e12:.3g} TFLOP a sample instead of "
            f"{fitting[0].now / 1e12:.3g}, {fitting[0].speed_up:.2f} x"
        )
    return "\n".join(lines)


def disk(d: Description) -> str:
    def cached(each: int, of: str) -> str:
        return f"{size(each)} per {of} in bfloat16, {size(1e6 * each)} per million"

    rows = {
        "checkpoint": f"{size(d.checkpoint_whole)}, of which {size(d.checkpoint_weights)} are what sampling needs; "
        "a GPU copies it to main memory first",
        "cached text features": cached(d.feature_bytes, f"caption of {d.tokens} tokens"),
        "cached latents": cached(d.latent_bytes, "image"),
    }
    width = max(map(len, rows))
    return "\n".join(["Disk", *(f"  {name.ljust(width)}  {value}" for name, value in rows.items())])


def speed(d: Description) -> str:
    t = d.throughput
    cached = (
        f"{t.cached_samples_per_second:,.1f} with text features and latents given"
        if t.cached_samples_per_second
        else "text features cannot be given where the language model is trained"
    )
    lacking = "" if t.half == "bfloat16" or d.config.precision == "fp32" else f" in {t.half}: it has no bfloat16"
    money = "" if t.money is None else f", which cost {t.money:,.2f}"
    return (
        f"Time on {t.gpus} x {t.device} ({t.peak_tflops:g} TFLOP/s each at its data sheet{lacking}) at {t.mfu:.0%} of that:\n"
        f"  {t.samples_per_second:,.1f} samples/s; {cached}\n  {d.config.max_steps:,} steps of {d.config.batch_size}: "
        f"{duration(t.days)}, {t.gpu_hours:,.1f} GPU-hours{money}"
    )


def duration(days: float) -> str:
    if days >= 1:
        return f"{days:,.1f} days"
    return f"{days * 24:.1f} hours" if days * 24 >= 1 else f"{days * 1440:.1f} minutes"


def advice(entry: Advice) -> str:
    rows = [(c.override, f"saves {gib(c.saves)}", f"leaves {gib(c.total)}", "fits" if c.fits else "does not fit") for c in entry.changes]
    lines = [
        f"{TITLES[entry.launch]} needs {gib(entry.needed)} GiB of {gib(entry.available)}. One change alone:",
        table(rows) if rows else "  none of the keys saves anything.",
    ]
    if len(entry.together) > 1:
        verdict = "fits" if entry.fits else "still does not fit"
        lines.append(f"  together: {' '.join(entry.together)} -> {gib(entry.total)}, which {verdict}.")
    return "\n".join(lines)
