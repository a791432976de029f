"""What the page of an inspection is put together from: tables, pictures with their names, cards of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from paradiffusion.curation.inspecting.inspect import ShownSample
from paradiffusion.pages import page_text

# Characters of a caption on the page: twice what 512 tokens hold. A caption may be a whole book.
LONGEST_SHOWN: Final = 5000


def card(sample: ShownSample) -> str:
    """A sample as a card: its picture, every caption with its lengths, and where it lies."""
    picture = f'<p class="missing">{page_text(sample.error or "no picture")}</p>'
    if sample.thumbnail:
        tiny = ' class="tiny"' if max(sample.width, sample.height) <= 128 else ""
        alt = page_text(next(iter(sample.captions.values()), sample.key)[:200])
        picture = f'<img src="{sample.thumbnail}"{tiny} decoding="async" alt="{alt}">'
    captions = []
    for kind, text in sample.captions.items():
        counted = [f"{n} tokens by {name}" for name, n in sample.tokens.get(kind, {}).items()]
        numbers = ", ".join([f"{sample.words[kind]} words", *counted])
        captions.append(
            f'<p class="caption"><b>{page_text(kind)}</b> <small>{page_text(numbers)}</small><br><bdi>{_shortened(text)}</bdi></p>'
        )
    facts = f"{sample.width}x{sample.height}, bucket {sample.bucket}, {size(sample.bytes)}"
    none = '<p class="caption"><small>no caption</small></p>' if not captions else ""
    return f'<article>{picture}{"".join(captions)}{none}<p class="key">{page_text(sample.key)}<br>{page_text(facts)}</p></article>'


def _shortened(text: str) -> str:
    if len(text) <= LONGEST_SHOWN:
        return page_text(text)
    left_out = len(text) - LONGEST_SHOWN
    return f"{page_text(text[:LONGEST_SHOWN])}… <small>({left_out:,} more characters, in the .json beside this page)</small>"


def plots(drawn: Sequence[tuple[str, str]]) -> str:
    """Pictures (SVG), each under its name."""
    figures = "".join(f"<figure><figcaption>{page_text(name)}</figcaption>{svg}</figure>" for name, svg in drawn)
    return f'<div class="plots">{figures}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = (), escape: bool = True) -> str:
    """A table; cells are text, or HTML of this file's own with ``escape`` off."""
    top = "".join(f'<th scope="col">{page_text(cell)}</th>' for cell in head)
    body = []
    for number, row in enumerate(rows):
        cells = "".join(f"<td>{page_text(cell) if escape else cell}</td>" for cell in row)
        kind = f' class="{classes[number]}"' if number < len(classes) and classes[number] else ""
        body.append(f"<tr{kind}>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def figure(value: float) -> str:
    """Three digits that mean something, and no exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def size(count: int) -> str:
    """Bytes in the unit that suits them."""
    amount = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:,.0f} {unit}" if unit == "bytes" else f"{amount:,.1f} {unit}"
        amount /= 1024
    return f"{amount:,.2f} TiB"
