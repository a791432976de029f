"""The inspection of a data set as a page: figures first, then samples to look at."""

from __future__ import annotations

from paradiffusion.curation.inspecting.caption_figures import CUTS, OPENING_WORDS
from paradiffusion.curation.inspecting.histograms import histogram_svg
from paradiffusion.curation.inspecting.inspect import ASPECTS, BANDS, Inspection
from paradiffusion.curation.inspecting.page_parts import card, figure, plots, size, table
from paradiffusion.pages import page, page_text

STYLE = """
body { max-width: 84rem; }
nav { position: sticky; top: 0; background: Canvas; padding: .5rem 0; border-bottom: 1px solid var(--line); display: flex;
  flex-wrap: wrap; gap: 1rem; z-index: 1; }
section { scroll-margin-top: 3rem; margin-top: 2rem; }
h2 { font-size: 1.2rem; margin: 0 0 .5rem; } h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
.tiles { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); margin: 1rem 0; }
.tile { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; background: var(--card); }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; } .tile span { color: var(--soft); font-size: .85rem; }
ul.notes { border-left: .35rem solid var(--unsure); background: var(--card); margin: 0; padding: .6rem .9rem .6rem 2rem; border-radius: .25rem; }
ul.notes.fine { border-color: var(--good); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; } th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; min-width: 8rem; }
tr.paper td { color: var(--soft); }
.plots { display: flex; flex-wrap: wrap; gap: 1rem 2rem; } figure { margin: 0; max-width: 100%; } figcaption { font-size: .9rem; }
.note { color: var(--soft); font-size: .88rem; max-width: 60rem; }
.bar { display: inline-block; height: .7rem; background: var(--mark); border-radius: 2px; vertical-align: middle; min-width: 1px; }
article img { max-height: 18rem; } .caption { margin: .5rem 0 0; overflow-wrap: anywhere; max-height: 14rem; overflow-y: auto; }
.caption b { font-weight: 600; } .caption small { color: var(--soft); }
.missing { border: 1px dashed var(--bad); border-radius: .25rem; padding: 2rem .5rem; text-align: center; color: var(--bad); }
"""
SECTIONS = {
    "run": "The run", "paper": "Beside the paper's sets", "captions": "Captions", "tokens": "Tokens", "images": "Images", "buckets": "Buckets",
    "padding": "Padding", "samples": "Samples", "worst": "Worst cases",
}  # fmt: skip
# Set, mean words, bands of words (as BANDS), mean short side: the authors' own table.
PAPER = (
    ("LAION, stage 1", 11.8, None, 537),
    ("ParaImage-Big, stage 2", 132.9, (0.19, 0.51, 0.25, 0.05), 771),
    ("ParaImage-Small, stage 3", 70.6, (0.83, None, None, None), 1326),
)


def inspection_page(found: Inspection) -> str:
    """The HTML of an inspection."""
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title in SECTIONS.items())
    parts = {
        "run": _run(found),
        "paper": _paper(found),
        "captions": _captions(found),
        "tokens": _tokens(found),
        "images": _images(found),
        "buckets": _buckets(found),
        "padding": _padding(found),
        "samples": _samples(found),
        "worst": _worst(found),
    }
    sections = [f'<section id="{name}"><h2>{SECTIONS[name]}</h2>{content}</section>' for name, content in parts.items()]
    title = f"Data: {found.settings.title}"
    body = [f"<header><h1>{page_text(title)}</h1>{_tiles(found)}{_notes(found)}</header><nav>{links}</nav>", *sections]
    return page(title, STYLE, "\n".join(body))


def _tiles(found: Inspection) -> str:
    counts, sides = found.counts, found.images.short_side
    tiles = [
        (f"{counts['samples']:,}", "samples"),
        (f"{counts['shards']:,}", "shards"),
        (size(counts["bytes"]), "of images and captions"),
        *((f"{kind.words.mean:.1f}", f"words, mean of {kind.kind}") for kind in found.kinds if kind.words is not None),
        (f"{sides.mean:,.0f} px", "mean short side") if sides else ("unknown", "short side"),
        (f"{found.padding.trained:.1%}", "of tokens are padding") if found.padding else ("unknown", "padding"),
        (f"{min(source.epochs for source in found.run):,.3g}", "epochs in the run's steps"),
        (f"{len(found.undecodable):,} of {found.checked:,}", "checked images do not decode"),
    ]
    drawn = "".join(f'<div class="tile"><b>{page_text(b)}</b><span>{page_text(s)}</span></div>' for b, s in tiles)
    passed = [
        (counts["without_caption"], "samples without a caption"),
        (counts["without_image"], "entries without an image"),
        (counts["stray"], "other files"),
        (counts["bad_json"], "unreadable JSON"),
        (counts["unreadable_header"], "unknown image sizes"),
        (len(counts["truncated_shards"]), "truncated shards"),
    ]
    line = ", ".join(f"{count:,} {name}" for count, name in passed)
    return f'<div class="tiles">{drawn}</div><p class="note">{line}.</p>'


def _notes(found: Inspection) -> str:
    if not found.notes:
        return '<ul class="notes fine"><li>Nothing stands out.</li></ul>'
    return f'<ul class="notes">{"".join(f"<li>{page_text(note)}</li>" for note in found.notes)}</ul>'


def _run(found: Inspection) -> str:
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
    return (
        f'{table(head, rows)}<p class="note">What {found.run[0].steps:,} steps (max_steps) of {found.batch_size:,} samples '
        "(batch_size) see: an epoch is once through a source.</p>"
    )


def _paper(found: Inspection) -> str:
    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.0%}"

    rows = [
        ("paper", (name, f"{words:.1f}", *(share(band) for band in bands or (None,) * 4), f"{side} px"))
        for name, words, bands, side in PAPER
    ]
    side = found.images.short_side
    for kind in found.kinds:
        if kind.words is not None:
            name = f"this set, {kind.kind} captions"
            bands = [share(kind.bands[band]) for band in BANDS]
            rows.append(("", (name, f"{kind.words.mean:.1f}", *bands, f"{side.mean:,.0f} px" if side else "")))
    head = ("", "mean words", *(f"{band} words" for band in BANDS), "mean short side")
    return table(head, [row for _, row in rows], [kind for kind, _ in rows])


def _captions(found: Inspection) -> str:
    rows, drawn = [], []
    for kind in found.kinds:
        words = kind.words
        figures = (f"{words.mean:.1f}", f"{words.median:.0f}", f"{words.p5:.0f} to {words.p95:.0f}", f"{words.largest:.0f}") if words else ("",) * 4  # fmt: skip
        planned = f"{kind.planned:.1%}" if found.padding else ""
        rows.append((kind.kind, f"{kind.samples:,}", f"{kind.weight:.0%}", planned, *figures))
        if words:
            drawn.append((f"{kind.kind}: {words.n:,} captions", histogram_svg(words, f"words of {kind.kind}", "words")))
    kinds = table(
        ("kind", "samples that have it", "configured share", "share in planned batches", "mean words", "median", "5 to 95 %", "longest"),
        rows,
    )  # fmt: skip
    return (
        f'{kinds}<p class="note">A sample without the drawn kind is read with another one that it has.</p>{plots(drawn)}'
        f"{_openings(found)}"
    )


def _openings(found: Inspection) -> str:
    rows = [(words, kind.kind, f"{share:.1%}", f"{kind.n:,}") for kind in found.openings for words, share in kind.most]
    if not rows:
        return ""
    return (
        f"<h3>How captions begin</h3>{table(('first words', 'kind', 'share', 'of captions'), rows)}"
        f'<p class="note">The most frequent first {OPENING_WORDS} words of the captions that were read; what many begin with, a '
        "model expects of every prompt.</p>"
    )


def _tokens(found: Inspection) -> str:
    if not found.tokens:
        return '<p class="note">No tokenizer was given.</p>'
    rows = [
        (
            f"{row.tokenizer}, {row.kind}", f"{row.n:,}", f"{row.tokens.mean:.1f}", f"{row.tokens.median:.0f}",
            f"{row.tokens.p95:.0f}", f"{row.tokens.largest:.0f}", f"{row.per_word:.2f}", *(f"{row.cut[cut]:.2%}" for cut in CUTS),
        )
        for row in found.tokens
    ]  # fmt: skip
    head = ("tokenizer, kind", "captions", "mean", "median", "95 %", "longest", "tokens a word")
    drawn = [
        (f"{row.tokenizer}, {row.kind}", histogram_svg(row.tokens, f"tokens of {row.kind}", "tokens", CUTS))
        for row in found.tokens
    ]
    total, read = found.counts["samples"], found.captions_read
    whose = "all samples" if read == total else f"{read:,} samples drawn from {total:,}"
    repeated = "".join(f"<li>{times:,} times: {page_text(text[:300])}</li>" for text, times in found.repeated)
    listed = f"<h3>Repeated captions</h3><ul>{repeated}</ul>" if repeated else ""
    return (
        f'{table((*head, *(f"cut at {cut}" for cut in CUTS)), rows)}<p class="note">From the captions of {whose}; start and '
        f"end marks count. {found.repeated_share:.1%} of these captions repeat another one word for word.</p>"
        f"{plots(drawn)}{listed}"
    )


def _images(found: Inspection) -> str:
    images, drawn = found.images, []
    if images.short_side:
        mark = [found.settings.resolution]
        drawn.append(("short side", histogram_svg(images.short_side, "short sides", "pixels", mark)))
    if images.aspect:
        names = [f"{edge:.2f}" for edge in ASPECTS[:-1]]
        drawn.append(("width over height", histogram_svg(images.aspect, "aspects", "from this aspect on", names=names)))
    if images.megapixels:
        drawn.append(("area", histogram_svg(images.megapixels, "areas", "megapixels")))
    formats = ", ".join(f"{count:,} {name}" for name, count in images.formats.items())
    rows = [
        (name, figure(d.mean), figure(d.median), f"{figure(d.p5)} to {figure(d.p95)}", figure(d.smallest), figure(d.largest))
        for name, d in (("short side, px", images.short_side), ("width over height", images.aspect), ("megapixels", images.megapixels))
        if d is not None
    ]  # fmt: skip
    sizes = table(("", "mean", "median", "5 to 95 %", "smallest", "largest"), rows)
    return f'{plots(drawn)}{sizes}<p class="note">{page_text(formats)}. The dashed line is data.resolution.</p>'


def _buckets(found: Inspection) -> str:
    most = max((bucket.share for bucket in found.buckets), default=0) or 1
    rows = [
        (
            f"{bucket.width}x{bucket.height}", f"{bucket.samples:,}",
            f'<span class="bar" style="width:{bucket.share / most * 8:.2f}rem"></span> {bucket.share:.1%}',
            f"{bucket.batches:,.2f}", f"{bucket.cropped:.1%}", f"{bucket.enlarged:.1%}",
        )
        for bucket in found.buckets
    ]  # fmt: skip
    head = ("bucket", "samples", "share", "batches an epoch", "cropped away", "enlarged")
    note = (
        "What does not fill a batch waits for the next epoch; nothing is dropped. Cropped away is the mean share of an image's "
        "area, enlarged the share of images that are smaller than the bucket."
    )
    return f'{table(head, rows, escape=False)}<p class="note">{note}</p>'


def _padding(found: Inspection) -> str:
    padding = found.padding
    if padding is None:
        return '<p class="note">No tokenizer was given.</p>'
    rows = [
        ("planned batches (sorted by length inside a bucket)", f"{padding.planned:.1%}", f"{padding.planned_rounded:.1%}"),
        ("the same captions in random batches", f"{padding.unsorted:.1%}", f"{padding.unsorted_rounded:.1%}"),
        (f"every caption padded to the maximum of {padding.limit} tokens", f"{padding.to_limit:.1%}", f"{padding.to_limit:.1%}"),
    ]  # fmt: skip
    head = ("", "padded to the longest", f"rounded up to a multiple of {padding.multiple}")
    return (
        f'{table(head, rows)}<p class="note">The share of computed tokens that is padding, with {page_text(padding.tokenizer)}, '
        f"in {padding.batches:,} of an epoch's {padding.of_batches:,} batches of {padding.batch_size}. This stage computes "
        f"{padding.trained:.1%}; dropped captions, which are shorter than all others, are not counted.</p>"
    )


def _samples(found: Inspection) -> str:
    cards = "".join(card(sample) for sample in found.shown)
    return f'<p class="note">{len(found.shown)} samples drawn at random (seed {found.settings.seed}).</p><div class="cards">{cards}</div>'


def _worst(found: Inspection) -> str:
    parts = [
        f'<h3>{page_text(name.capitalize())}</h3><div class="cards">{"".join(card(sample) for sample in samples)}</div>'
        for name, samples in found.worst.items()
    ]
    if found.undecodable:
        rows = [(name, reason) for name, reason in found.undecodable[:50]]
        parts.append(
            f"<h3>Images that do not decode, of {found.checked:,} checked</h3>{table(('sample', 'why'), rows)}"
        )
    return "".join(parts) or '<p class="note">There is nothing to show.</p>'
