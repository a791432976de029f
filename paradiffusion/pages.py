"""Self-contained pages: one HTML file with its own style and pictures, readable without a network, light or dark."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Final

from PIL import Image

# Below this side a picture is embedded as it is; a JPEG of so few pixels would show its own blocks.
_EXACT_SIDE: Final = 128
_STYLE: Final = """
:root { color-scheme: light dark; --line: #8883; --soft: #666; --card: #8881; --good: #1f7a3f; --bad: #bb3333;
  --unsure: #8a5d00; --mark: #2a66bd; }
@media (prefers-color-scheme: dark) { :root { --soft: #a0a0a0; --good: #55b97a; --bad: #f08080; --unsure: #dca540;
  --mark: #6ea6f0; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1.25rem; max-width: 110rem; overflow-wrap: break-word; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
a { color: var(--mark); }
img { display: block; width: 100%; height: auto; object-fit: contain; border-radius: .25rem; }
img.tiny { image-rendering: pixelated; }
svg { max-width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
article { border: 1px solid var(--line); border-radius: .5rem; padding: .75rem; min-width: 0; background: var(--card); }
article:target, article:focus-within { outline: 2px solid var(--mark); }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.key { color: var(--soft); font-size: .8rem; overflow-wrap: anywhere; margin: .3rem 0 0; }
.tag { display: inline-block; max-width: 100%; border-radius: 1rem; padding: 0 .55rem; font-size: .78rem; border: 1px solid var(--line);
  margin: 0 .25rem .25rem 0; }
.tag.warn { border-color: var(--bad); color: var(--bad); }
"""


def page(title: str, style: str, body: str) -> str:
    """A whole page. ``title`` is text; ``style`` (CSS) and ``body`` (HTML) are taken as they are."""
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{page_text(title)}</title><style>{_STYLE}{style}</style></head>"
    )
    return f"{head}\n<body>\n{body}\n</body></html>\n"


def page_text(text: str) -> str:
    """``text`` for a page: markup escaped, and control characters, which HTML does not allow, replaced. Joiners stay: families
    of emoji and Persian words are written with them."""
    return escape("".join(c if c.isprintable() or c in "\n\t\u200c\u200d" else "\ufffd" for c in text))


def thumbnail_uri(image: Image.Image, side: int = 320) -> str:
    """An RGB ``image`` as a data URI, its longer side at most ``side`` pixels: PNG where it is tiny, else JPEG."""
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if max(small.size) <= _EXACT_SIDE:
        kind = "png"
        small.save(buffer, "PNG", optimize=True)
    else:
        kind = "jpeg"
        small.save(buffer, "JPEG", quality=86)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
