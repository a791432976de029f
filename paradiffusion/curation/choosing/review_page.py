"""The review page: its markup and style. What it does is in review_script.py."""

from __future__ import annotations

import json
from html import escape

from paradiffusion.curation.choosing.review_script import SCRIPT

WORDS = (50, 100)
"""The band of words that 83 % of ParaImage-Small's descriptions lie in."""

STYLE = """
:root { color-scheme: light dark; --back: #f6f6f4; --card: #fff; --ink: #1d1f21; --soft: #6a6f76; --line: #d9dade;
  --keep: #16794a; --drop: #b3312c; --blue: #2c63c9; --warn: #9a5b00; }
@media (prefers-color-scheme: dark) { :root { --back: #16181b; --card: #1f2226; --ink: #e8e9eb; --soft: #9aa0a8;
  --line: #363a40; --keep: #46bd83; --drop: #ef7f78; --blue: #7ea6f4; --warn: #e5ae57; } }
* { box-sizing: border-box; }
html, body { height: 100%; margin: 0; }
body { background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; display: grid;
  grid-template: auto minmax(0, 1fr) / minmax(0, 1fr) min(27rem, 42vw); }
header { grid-column: 1 / -1; display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: center;
  padding: .5rem 1rem; background: var(--card); border-bottom: 1px solid var(--line); }
h1 { font-size: 1rem; margin: 0; }
header label { color: var(--soft); display: flex; gap: .4rem; align-items: center; }
header input { width: 9rem; }
progress { flex: 1 1 8rem; height: .6rem; accent-color: var(--keep); }
input, select, textarea, button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: .4rem; padding: .25rem .5rem; }
:focus-visible { outline: 2px solid var(--blue); outline-offset: 1px; }
#stage { position: relative; overflow: hidden; display: flex; align-items: center; justify-content: center; padding: 1rem;
  min-width: 0; }
#stage img { max-width: 100%; max-height: 100%; object-fit: contain; border-radius: .3rem; cursor: zoom-in;
  box-shadow: 0 1px 8px #0003; }
#stage img.small { width: min(100%, 32rem); image-rendering: auto; }
#stage.zoomed { display: block; overflow: auto; }
#stage.zoomed img { max-width: none; max-height: none; cursor: zoom-out; }
#verdict { position: absolute; top: 1.4rem; left: 1.4rem; padding: .1rem .7rem; border-radius: 1rem; color: #fff;
  font-weight: 600; }
#verdict:empty { display: none; }
#verdict.keep { background: #16794a; } #verdict.drop { background: #b3312c; }
aside { overflow-y: auto; padding: 1rem; background: var(--card); border-left: 1px solid var(--line); display: flex;
  flex-direction: column; gap: .8rem; }
#place { display: flex; justify-content: space-between; color: var(--soft); font-variant-numeric: tabular-nums; gap: 1rem; }
#place label { white-space: nowrap; flex: none; }
#number { width: 4rem; text-align: right; }
#key { overflow-wrap: anywhere; text-align: right; }
.field { display: flex; flex-direction: column; gap: .25rem; }
.field > span { display: flex; justify-content: space-between; font-weight: 600; gap: 1rem; }
.field small { font-weight: 400; color: var(--soft); font-variant-numeric: tabular-nums; }
.field small.off { color: var(--warn); }
#caption { min-height: 13rem; resize: vertical; }
#note { min-height: 2.4rem; resize: vertical; }
.buttons { display: grid; grid-template-columns: 1fr 1fr 1fr; gap: .5rem; }
button { padding: .5rem; cursor: pointer; }
button:hover { border-color: var(--ink); }
button.keep { color: var(--keep); font-weight: 600; } button.drop { color: var(--drop); font-weight: 600; }
body.waiting .buttons { opacity: .5; }
kbd { font: .8em ui-monospace, monospace; border: 1px solid var(--line); border-radius: .25rem; padding: 0 .3rem;
  color: var(--soft); }
details summary { cursor: pointer; color: var(--soft); }
details p { margin: .3rem 0; overflow-wrap: anywhere; white-space: pre-wrap; }
#scores { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
#scores td { padding: 0 .2rem; border-bottom: 1px solid var(--line); } #scores td + td { text-align: right; }
#others { color: var(--soft); } #others:empty { display: none; }
#status { min-height: 1.5rem; color: var(--soft); font-size: .9rem; }
#status.bad { color: var(--drop); font-weight: 600; }
#notice { border: 1px solid var(--warn); border-radius: .4rem; padding: .5rem .7rem; overflow-wrap: anywhere; }
#notice p { margin: 0 0 .4rem; white-space: pre-wrap; }
[hidden] { display: none !important; }
#done { max-width: 30rem; text-align: center; }
@media (max-width: 50rem) { html, body { height: auto; }
  body { grid-template: auto auto auto / minmax(0, 1fr); } #stage { height: 60vh; } aside { border-left: 0; } }
"""

BODY = """
<header>
  <h1 id="name"></h1>
  <progress id="progress" max="1" value="0" aria-label="decided"></progress>
  <span id="counts" aria-live="polite"></span>
  <label>show <select id="filter"><option value="undecided">undecided</option><option value="all">all</option>
    <option value="keep">kept</option><option value="drop">dropped</option></select></label>
  <label>reviewer <input id="reviewer" maxlength="60" autocomplete="off" spellcheck="false"></label>
</header>
<main id="stage">
  <img id="image" alt="candidate" hidden>
  <p id="done" hidden></p>
  <span id="verdict"></span>
</main>
<aside>
  <div id="place"><label>picture <input id="number" inputmode="numeric" autocomplete="off"> of <span id="total"></span>
    <kbd>g</kbd></label><span id="key"></span></div>
  <div class="buttons">
    <button id="keep" class="keep">keep <kbd>k</kbd></button>
    <button id="drop" class="drop">drop <kbd>d</kbd></button>
    <button id="undo">undo <kbd>u</kbd></button>
  </div>
  <div id="status" role="status"></div>
  <div id="notice" role="alert" hidden><p id="notice-text"></p>
    <button id="theirs">take the other text</button> <button id="close">close</button></div>
  <label class="field"><span>description <small><span id="words"></span> <kbd>e</kbd></small></span>
    <textarea id="caption" spellcheck="true"></textarea></label>
  <label class="field"><span>note <small><kbd>n</kbd></small></span><textarea id="note"></textarea></label>
  <div id="others"></div>
  <details><summary>captions in the shard</summary><div id="captions"></div></details>
  <details open><summary>scores</summary><table id="scores"><tbody></tbody></table></details>
  <details><summary>keys</summary><p><kbd>k</kbd> keep, <kbd>d</kbd> drop, <kbd>u</kbd> undo or go back,
    <kbd>←</kbd> <kbd>→</kbd> walk, <kbd>g</kbd> go to a picture by its number, <kbd>e</kbd> edit the description, <kbd>n</kbd> note, <kbd>z</kbd> or a click: zoom,
    <kbd>Esc</kbd> leave a text. Texts are saved at each pause.</p></details>
</aside>
"""


def page(nonce: str, name: str, identity: str, reviewer: str, most: int) -> str:
    """The page as HTML; a text takes at most ``most`` bytes as JSON.

    ``nonce`` is what its Content-Security-Policy lets run, ``name`` is shown, and ``identity`` keeps what waits in the
    browser apart from that of other reviews at the same address.
    """
    about = {"name": name, "id": identity, "reviewer": reviewer, "words": WORDS, "most": most}
    settings = json.dumps(about).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(name)}: review</title><link rel="icon" href="data:,">'
        f'<style nonce="{nonce}">{STYLE}</style></head><body>{BODY}'
        f'<script nonce="{nonce}" type="application/json" id="settings">{settings}</script>'
        f'<script nonce="{nonce}">{SCRIPT}</script></body></html>'
    )
