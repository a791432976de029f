"""The inspection of a data set as a page: figures first, then samples to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from jinja2.filters import do_filesizeformat as filesizeformat

from paradiffusion.curation.inspecting.caption_figures import CUTS, OPENING_WORDS
from paradiffusion.curation.inspecting.histograms import histogram
from paradiffusion.curation.inspecting.inspect import ASPECTS, BANDS, Inspection
from paradiffusion.data.index import COUNTS
from paradiffusion.pages import Cell, Grid, Group, cells, render, text_grid

# Characters of a caption on the page: twice what 512 tokens hold. A caption may be a whole book.
LONGEST_SHOWN: Final = 5000
# Set, mean words, bands of words (as BANDS), mean short side: the authors' own table.
PAPER: Final = (
    ("LAION, stage 1", 11.8, None, 537),
    ("ParaImage-Big, stage 2", 132.9, (0.19, 0.51, 0.25, 0.05), 771),
    ("ParaImage-Small, stage 3", 70.6, (0.83, None, None, None), 1326),
)


def inspection_page(found: Inspection) -> str:
    """The HTML of an inspection."""
    undecodable = [(name, reason) for name, reason in found.undecodable[:50]]
    return render(
        "curation/inspecting/templates/inspection.html", title=f"Data: {found.settings['title']}", tiles=_tiles(found),
        passed=_passed(found), notes=found.notes, longest=LONGEST_SHOWN, shown=found.shown,
        seed=found.settings["seed"], worst=found.worst, checked=found.checked,
        undecodable=text_grid(("sample", "why"), undecodable, words=2) if undecodable else None,
        parts=[
            _run(found), _paper(found), _captions(found), _tokens(found), _images(found), _buckets(found), _padding(found),
        ],
    )  # fmt: skip


def _part(
    name: str, title: str, grid: Grid | None = None, note: str = "", drawn: Sequence[Any] = (), more: Any = None,
    repeated: Sequence[tuple[str, int]] = (),
) -> dict[str, Any]:  # fmt: skip
    """A section: its table, what stands below, its histograms, and a further table."""
    return {
        "name": name, "title": title, "grid": grid, "note": note, "drawn": drawn, "more": more, "repeated": repeated,
    }  # fmt: skip


def _tiles(found: Inspection) -> list[tuple[str, str]]:
    counts, sides = found.counts, found.images.short_side
    return [
        (f"{counts['samples']:,}", "samples"),
        (f"{counts['shards']:,}", "shards"),
        (filesizeformat(counts["bytes"], binary=True), "of images and captions"),
        *((f"{kind.words.mean:.1f}", f"words, mean of {kind.kind}") for kind in found.kinds if kind.words is not None),
        (f"{sides.mean:,.0f} px", "mean short side") if sides else ("unknown", "short side"),
        (f"{found.padding.trained:.1%}", "of tokens are padding") if found.padding else ("unknown", "padding"),
        (f"{min(source.epochs for source in found.run):,.3g}", "epochs in the run's steps"),
        (f"{len(found.undecodable):,} of {found.checked:,}", "checked images do not decode"),
    ]


def _passed(found: Inspection) -> str:
    """What was passed over."""
    counts = found.counts
    passed = [
        (counts["without_caption"], "samples without a caption"),
        *((counts[name], said) for name, said in COUNTS.items()),
        (counts["unreadable_header"], "unknown image sizes"),
        (len(counts["truncated_shards"]), "truncated shards"),
    ]
    return ", ".join(f"{count:,} {name}" for count, name in passed)


def _run(found: Inspection) -> dict[str, Any]:
    planned = found.padding.sources if found.padding else {}
    total = found.counts["samples"]
    rows = [
        (
            row.source, f"{row.samples:,}", f"{found.counts['sources'][row.source] / total:.1%}", f"{row.share:.1%}",
            f"{planned[row.source]:.1%}" if row.source in planned else "", f"{row.seen:,.0f}", figure(row.epochs),
        )
        for row in found.run
    ]  # fmt: skip
    head = (
        "source", "samples that can be used", "share of all samples", "configured share", "share in planned batches",
        "samples seen", "epochs",
    )  # fmt: skip
    steps = f"{found.run[0].steps:,} steps (max_steps) of {found.batch_size:,} samples (batch_size)"
    note = f"What {steps} see: an epoch is once through a source."
    return _part("run", "The run", text_grid(head, rows), note)


def _paper(found: Inspection) -> dict[str, Any]:
    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.0%}"

    paper = [
        cells([name, f"{words:.1f}", *(share(band) for band in bands or (None,) * 4), f"{side} px"]) for name, words, bands, side in PAPER
    ]
    side = found.images.short_side
    own = []
    for kind in found.kinds:
        if kind.words is not None:
            bands = [share(kind.bands[band]) for band in BANDS]
            mean_side = f"{side.mean:,.0f} px" if side else ""
            own.append(cells([f"this set, {kind.kind} captions", f"{kind.words.mean:.1f}", *bands, mean_side]))
    head = ["", "mean words", *(f"{band} words" for band in BANDS), "mean short side"]
    grid = Grid(head, [Group("", paper), Group("", own)])
    return _part("paper", "Beside the paper's sets", grid)


def _captions(found: Inspection) -> dict[str, Any]:
    rows, drawn = [], []
    for kind in found.kinds:
        words = kind.words
        figures = ("",) * 4
        if words:
            middle = f"{words.p5:.0f} to {words.p95:.0f}"
            figures = (f"{words.mean:.1f}", f"{words.median:.0f}", middle, f"{words.largest:.0f}")
            title = f"{kind.kind}: {words.n:,} captions"
            drawn.append(histogram(words, title, f"words of {kind.kind}", "words"))
        planned = f"{kind.planned:.1%}" if found.padding else ""
        rows.append((kind.kind, f"{kind.samples:,}", f"{kind.weight:.0%}", planned, *figures))
    head = (
        "kind", "samples that have it", "configured share", "share in planned batches", "mean words", "median",
        "5 to 95 %", "longest",
    )  # fmt: skip
    note = "A sample without the drawn kind is read with another one that it has."
    begin = [(words, kind.kind, f"{share:.1%}", f"{kind.n:,}") for kind in found.openings for words, share in kind.most]
    about = (
        f"The most frequent first {OPENING_WORDS} words of the captions that were read; what many begin with, a model expects "
        "of every prompt."
    )
    openings = text_grid(("first words", "kind", "share", "of captions"), begin, about, words=2)
    more = {"title": "How captions begin", "grid": openings} if begin else None
    return _part("captions", "Captions", text_grid(head, rows), note, drawn, more)


def _tokens(found: Inspection) -> dict[str, Any]:
    if not found.tokens:
        return _part("tokens", "Tokens", note="No tokenizer was given.")
    rows = [
        (
            f"{row.tokenizer}, {row.kind}", f"{row.n:,}", f"{row.tokens.mean:.1f}", f"{row.tokens.median:.0f}",
            f"{row.tokens.p95:.0f}", f"{row.tokens.largest:.0f}", f"{row.per_word:.2f}", *(f"{row.cut[cut]:.2%}" for cut in CUTS),
        )
        for row in found.tokens
    ]  # fmt: skip
    head = ("tokenizer, kind", "captions", "mean", "median", "95 %", "longest", "tokens a word")
    drawn = [histogram(row.tokens, f"{row.tokenizer}, {row.kind}", f"tokens of {row.kind}", "tokens", CUTS) for row in found.tokens]
    total, read = found.counts["samples"], found.captions_read
    whose = "all samples" if read == total else f"{read:,} samples drawn from {total:,}"
    note = (
        f"From the captions of {whose}; start and end marks count. {found.repeated_share:.1%} of these captions repeat "
        "another one word for word."
    )
    grid = text_grid((*head, *(f"cut at {cut}" for cut in CUTS)), rows)
    return _part("tokens", "Tokens", grid, note, drawn, repeated=found.repeated)


def _images(found: Inspection) -> dict[str, Any]:
    images, drawn = found.images, []
    if images.short_side:
        mark = [found.settings["resolution"]]
        drawn.append(histogram(images.short_side, "short side", "short sides", "pixels", mark))
    if images.aspect:
        names = [f"{edge:.2f}" for edge in ASPECTS[:-1]]
        drawn.append(histogram(images.aspect, "width over height", "aspects", "from this aspect on", names=names))
    if images.megapixels:
        drawn.append(histogram(images.megapixels, "area", "areas", "megapixels"))
    formats = ", ".join(f"{count:,} {name}" for name, count in images.formats.items())
    rows = [
        (name, figure(d.mean), figure(d.median), f"{figure(d.p5)} to {figure(d.p95)}", figure(d.smallest), figure(d.largest))
        for name, d in (("short side, px", images.short_side), ("width over height", images.aspect), ("megapixels", images.megapixels))
        if d is not None
    ]  # fmt: skip
    grid = text_grid(("", "mean", "median", "5 to 95 %", "smallest", "largest"), rows)
    return _part("images", "Images", grid, f"{formats}. The dashed line is data.resolution.", drawn)


def _buckets(found: Inspection) -> dict[str, Any]:
    most = max((bucket.share for bucket in found.buckets), default=0) or 1
    rows = [
        [
            Cell(f"{bucket.width}x{bucket.height}"),
            Cell(f"{bucket.samples:,}"),
            Cell("", bar=(bucket.share / most,)),
            *cells([f"{bucket.share:.1%}", f"{bucket.batches:,.2f}", f"{bucket.cropped:.1%}", f"{bucket.enlarged:.1%}"]),
        ]
        for bucket in found.buckets
    ]
    head = ["bucket", "samples", "", "share", "batches an epoch", "cropped away", "enlarged"]
    note = (
        "What does not fill a batch waits for the next epoch; nothing is dropped. Cropped away is the mean share of an image's "
        "area, enlarged the share of images that are smaller than the bucket."
    )
    return _part("buckets", "Buckets", Grid(head, [Group("", rows)]), note)


def _padding(found: Inspection) -> dict[str, Any]:
    padding = found.padding
    if padding is None:
        return _part("padding", "Padding", note="No tokenizer was given.")
    rows = [
        ("planned batches (sorted by length inside a bucket)", f"{padding.planned:.1%}", f"{padding.planned_rounded:.1%}"),
        ("the same captions in random batches", f"{padding.unsorted:.1%}", f"{padding.unsorted_rounded:.1%}"),
        (f"every caption padded to the maximum of {padding.limit} tokens", f"{padding.to_limit:.1%}", f"{padding.to_limit:.1%}"),
    ]  # fmt: skip
    head = ("", "padded to the longest", f"rounded up to a multiple of {padding.multiple}")
    note = (
        f"The share of computed tokens that is padding, with {padding.tokenizer}, in {padding.batches:,} of an epoch's "
        f"{padding.of_batches:,} batches of {padding.batch_size}. This stage computes {padding.trained:.1%}; dropped captions, "
        "which are shorter than all others, are not counted."
    )
    return _part("padding", "Padding", text_grid(head, rows), note)


def figure(value: float) -> str:
    """Three digits that mean something, and no exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
