"""The page of a replayed step: one file, readable without a network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from paradiffusion.pages import page, page_text

if TYPE_CHECKING:
    from paradiffusion.training.replay_record import ReplayedSample

MAX_EMBEDDED = 600  # pictures; a page with more shows those with the smaller losses by their files
TINY = 128  # pixels of the longer side; smaller pictures are shown enlarged with hard edges

STYLE = """
.verdict { border-left: .35rem solid var(--unsure); background: var(--card); padding: .6rem .9rem; margin: 0 0 1rem;
  border-radius: .25rem; overflow-wrap: anywhere; }
.verdict.identical { border-color: var(--good); } .verdict.different { border-color: var(--bad); }
.top { display: flex; flex-wrap: wrap; gap: 2rem; align-items: flex-start; margin-bottom: 1.5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; min-width: min(100%, 24rem);
  flex: 1; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
img { max-height: 22rem; }
.loss { font-size: 1.1rem; font-weight: 600; margin: .5rem 0 0; font-variant-numeric: tabular-nums; }
.loss small { font-weight: 400; color: var(--soft); }
.caption { margin: .4rem 0; overflow-wrap: anywhere; max-height: 16rem; overflow-y: auto; }
.unread, s { color: var(--soft); }
"""


def page_of(title: str, facts: Mapping[str, Any], verdict: str, certain: str, samples: Sequence[ReplayedSample]) -> str:
    """The HTML of a step: ``facts`` as a list, a picture of losses over times, and a card for each sample in order."""
    listed = "".join(f"<dt>{page_text(name)}</dt><dd>{page_text(_value(value))}</dd>" for name, value in facts.items())
    cards = [_card(sample, number < MAX_EMBEDDED) for number, sample in enumerate(samples)]
    body = [
        f"<header><h1>{page_text(title)}</h1>",
        f'<p class="verdict {page_text(certain)}" role="status">{page_text(verdict)}</p></header>',
        f'<section class="top"><dl>{listed}</dl>{_scatter(samples)}</section>',
        f'<main class="cards" aria-label="samples">{"".join(cards)}</main>',
    ]
    return page(title, STYLE, "\n".join(body))


def _value(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else "none" if value is None else str(value)


def _card(sample: ReplayedSample, embed: bool) -> str:
    loss = "no loss" if sample.loss is None else f"{sample.loss:.4f}"
    source = sample.thumbnail if embed else sample.image
    picture = '<p class="unread">no picture: its latents came from a cache, and it could not be read</p>'
    if sample.image is not None and source:
        tiny = ' class="tiny"' if max(sample.height, sample.width) <= TINY else ""
        picture = (
            f'<a href="{sample.image}"><img src="{source}" width="{sample.width}" height="{sample.height}"{tiny} '
            f'{"decoding" if embed else "loading"}="{"async" if embed else "lazy"}" alt="{page_text(sample.caption[:200])}"></a>'
        )
    return (
        f'<article id="slot{sample.slot}">{picture}<p class="loss">{loss} <small>at noise '
        f"{sample.noise_share:.3f} (t = {sample.time:.4g})</small></p>{_caption(sample)}<p>{_tags(sample)}</p>"
        f'<p class="key">{page_text(sample.key)}</p></article>'
    )


def _caption(sample: ReplayedSample) -> str:
    if sample.dropped:
        return f'<p class="caption"><s>{page_text(sample.caption)}</s></p>'
    if not sample.truncated:
        return f'<p class="caption">{page_text(sample.caption)}</p>'
    if sample.caption.startswith(sample.kept):
        rest = sample.caption[len(sample.kept) :]
        return f'<p class="caption">{page_text(sample.kept)}<s>{page_text(rest)}</s></p>'
    # The tokenizer does not spell the text as it was written (lower case, byte pieces): both are shown.
    return (
        f'<p class="caption">{page_text(sample.kept)}</p>'
        f'<p class="caption unread">whole: {page_text(sample.caption)}</p>'
    )


def _tags(sample: ReplayedSample) -> str:
    tags = [("", f"slot {sample.slot}"), ("", f"process {sample.rank}, micro-batch {sample.micro}"), ("", sample.kind)]
    if sample.dropped:
        tags.append(("warn", "caption dropped"))
    elif sample.truncated:
        tags.append(("warn", f"cut to {sample.limit} of {sample.tokens} tokens"))
    else:
        tags.append(("", f"{sample.tokens} tokens"))
    if sample.height:
        tags.append(("", f"{sample.width}x{sample.height}"))
    if not sample.weight:
        tags.append(("warn", "stands in for an unreadable sample: weight 0"))
    return "".join(f'<span class="tag {kind}">{page_text(text)}</span>' for kind, text in tags)


def _scatter(samples: Sequence[ReplayedSample]) -> str:
    """Losses over noise levels, one dot a sample that leads to its card: what is high for its time stands out."""
    drawn = [(s.slot, s.noise_share, s.loss) for s in samples if s.loss is not None and math.isfinite(s.loss)]
    if not drawn:
        return ""
    width, height, left, low = 420, 220, 46, 30
    highest = max(loss for _, _, loss in drawn) or 1.0

    def place(share: float, loss: float) -> tuple[float, float]:
        return left + min(max(share, 0), 1) * (width - left - 10), height - low - loss / highest * (height - low - 12)

    dots = []
    for slot, share, loss in drawn:
        x, y = place(share, loss)
        dots.append(
            f'<a href="#slot{slot}"><circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="var(--mark)" fill-opacity=".65">'
            f"<title>slot {slot}: {loss:.4f} at {share:.3f}</title></circle></a>"
        )
    base = height - low
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="loss of each sample over its noise level">'
        f'<path d="M{left} 8V{base}H{width - 8}" fill="none" stroke="var(--soft)"/>'
        f'<text x="{left - 6}" y="14" text-anchor="end">{highest:.3g}</text>'
        f'<text x="{left - 6}" y="{base}" text-anchor="end">0</text><text x="{left}" y="{height - 12}">0 (clean)</text>'
        f'<text x="{width - 10}" y="{height - 12}" text-anchor="end">1 (noise)</text>'
        f'<text x="{(left + width) / 2}" y="{height - 12}" text-anchor="middle">noise level</text>{"".join(dots)}</svg>'
    )
