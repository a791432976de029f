"""The playground's page: what a person types, the pictures, and their sentences in colours (Gradio)."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import gradio as gr
import numpy as np
from starlette.middleware import Middleware

from paradiffusion.apps.playground import PICTURES, AppOptions, Picture, Playground, Settings, sources_of
from paradiffusion.apps.serving import Hosts, address_of, listen, names_of
from paradiffusion.atomic import locked
from paradiffusion.checks import split_list
from paradiffusion.errors import UserError
from paradiffusion.evaluation.reporting.cards import MARKS
from paradiffusion.sampling.prompts import PromptRequest, read_prompts
from paradiffusion.stopping import stop_on_signals

USER: Final = "paradiffusion"
SIDE: Final = 360  # pixels that a picture is shown at
LEAST_TOKEN: Final = 12  # characters
# As cards.MARKS, and for a sentence that was left out what its change alone can say.
LABELS: Final = {
    "followed": "followed",
    "partly": "in part, or something changes without it",
    "ignored": "not followed, or nothing changes without it",
    "unknown": "not judged",
}
COLOURS: Final = {"followed": "#0072b2", "partly": "#c8b400", "ignored": "#d55e00", "unknown": "#999999"}
_THEME: Final = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no fonts of a network


def make_page(playground: Playground, examples: Sequence[PromptRequest] = ()) -> gr.Blocks:
    """The page; it draws when its button is pressed, and without a sentence when that is clicked."""
    with gr.Blocks(title="ParaDiffusion playground", analytics_enabled=False) as page:
        gr.Markdown("# ParaDiffusion playground\nA paragraph is drawn, and each of its sentences looked for in the picture.")
        for model, source in enumerate(playground.sources):
            gr.Textbox(playground.own(model), label=f"Model: {source.label}", interactive=False)
        text = gr.Textbox(label="Paragraph", lines=5, max_length=playground.max_characters, elem_id="text")
        gr.Markdown("0 where the model's own is meant; height and width in pixels.")
        with gr.Row():
            seed = _number("Seed", "seed", 0)
            count = _number("Pictures", "count", 1)
            steps = _number("Steps (0: own)", "steps")
            guidance = _number("Guidance (0: own)", "guidance", precision=None)
            height = _number("Height (0: own)", "height")
            width = _number("Width (0: own)", "width")
        rest = gr.Checkbox(
            True, elem_id="rest",
            label="Judge by leaving out, where a sentence cannot be read as a scene (a picture for each sentence, and one more)",
        )  # fmt: skip
        with gr.Row():
            button = gr.Button("Draw", variant="primary", elem_id="draw")
            stop = gr.Button("Stop after this picture")
        state = gr.Textbox(label="State", interactive=False, elem_id="state")
        session = gr.State([])
        slots = []
        for row in range(PICTURES):
            with gr.Row():
                slots += [_slot(playground, row * len(playground.sources) + n) for n in range(len(playground.sources))]
        if examples:
            rows = [[one.prompt, one.height or 0, one.width or 0] for one in examples]
            gr.Examples(rows, [text, height, width], label="Examples", examples_per_page=len(rows), cache_examples=False)
        inputs = [text, seed, count, steps, guidance, height, width, rest]
        outputs = [state, session, *(part for slot in slots for part in slot)]
        waiting: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1, "show_progress_on": state}
        drawn = button.click(_draws(playground, state, session, slots), inputs, outputs, **waiting)
        stop.click(lambda: "Stopped.", None, state, cancels=[drawn], queue=False)
        for number, slot in enumerate(slots):
            _, _, side, words, note = slot
            words.select(_leaves_out(playground, number, state, side, note), session, [state, side, note], **waiting)
    return page


Slot = tuple[gr.Column, gr.Image, gr.Image, gr.HighlightedText, gr.Textbox]


def _slot(playground: Playground, number: int) -> Slot:
    """A picture, beside it the one without a sentence, its sentences, and what is known of the one that was clicked."""
    with gr.Column(visible=False, elem_id=f"slot{number}") as column:
        with gr.Row():
            image = _image(f"whole{number}")
            side = _image(f"side{number}", visible=False)
        words = gr.HighlightedText(
            label="Click a sentence to draw the same seed without it", show_legend=True, elem_id=f"words{number}",
            color_map={LABELS[level]: colour for level, colour in COLOURS.items()},
        )  # fmt: skip
        note = gr.Textbox(label="The sentence that is left out", interactive=False, visible=False, elem_id=f"note{number}")
    return column, image, side, words, note


def _number(label: str, name: str, value: int = 0, precision: int | None = 0) -> gr.Number:
    return gr.Number(value, label=label, precision=precision, minimum=0, min_width=90, elem_id=name)


def _image(name: str, visible: bool = True) -> gr.Image:
    # The button to share would send the picture to the hub.
    buttons = ["download", "fullscreen"]
    return gr.Image(type="numpy", format="png", interactive=False, height=SIDE + 40, elem_id=name, visible=visible, buttons=buttons)


def _shown(picture: np.ndarray, **changes: Any) -> gr.Image:
    """A small picture enlarged with hard edges."""
    times = max(1, SIDE // max(picture.shape[:2]))
    return gr.Image(picture.repeat(times, 0).repeat(times, 1), **changes)


def _coloured(picture: Picture) -> list[tuple[str, str | None]]:
    """Sentence ``k`` is part 2 k."""
    parts: list[tuple[str, str | None]] = []
    for one in picture.sentences:
        parts += [(f"{MARKS[one.level][0]} {one.text}", LABELS[one.level]), (" ", None)]
    return parts


def _draws(playground: Playground, state: gr.Textbox, session: gr.State, slots: Sequence[Slot]) -> Callable[..., Iterator[dict[Any, Any]]]:
    def draw(
        text: str, seed: float | None, count: float | None, steps: float | None, guidance: float | None,
        height: float | None, width: float | None, rest: bool,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  Gradio looks for it here
    ) -> Iterator[dict[Any, Any]]:  # fmt: skip
        numbers = [None if not one else int(one) for one in (steps, height, width)]
        settings = Settings(int(seed or 0), numbers[0], guidance or None, *numbers[1:])
        found: list[Picture] = []
        tell = _telling(progress)
        yield {state: "Drawing.", session: [], **{slot[0]: gr.Column(visible=False) for slot in slots}}
        try:
            for picture in playground.draw(text, settings, int(count or 0), tell):
                column, image, side, words, note = slots[len(found)]
                found.append(picture)
                label = f"{playground.sources[picture.model].label}, seed {picture.settings.seed}: {picture.name}.png"
                yield {
                    column: gr.Column(visible=True), image: _shown(picture.pixels, label=label), words: _coloured(picture),
                    side: gr.Image(None, visible=False), note: gr.Textbox(visible=False), session: found, state: "Drawing.",
                }  # fmt: skip
            for slot, picture in zip(slots, found if rest else (), strict=False):
                playground.judge_rest(picture, tell)
                yield {slot[3]: _coloured(picture), session: found}
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        yield {state: f"Done; everything is in {playground.folder}."}

    return draw


def _leaves_out(
    playground: Playground, number: int, state: gr.Textbox, side: gr.Image, note: gr.Textbox
) -> Callable[..., Iterator[dict[Any, Any]]]:
    def leave_out(
        session: list[Picture], event: gr.SelectData, progress: gr.Progress = gr.Progress()  # noqa: B008
    ) -> Iterator[dict[Any, Any]]:  # fmt: skip
        index = event.index
        if not isinstance(index, int) or index % 2 or number >= len(session):
            return
        picture, place = session[number], index // 2
        if not 0 <= place < len(picture.sentences):
            return
        sentence = picture.sentences[place]
        said = f"{sentence.text} ({LABELS[sentence.level]}{''.join(f'; {one}' for one in sentence.notes)})"
        yield {state: "Drawing without it.", note: gr.Textbox(said, visible=True)}
        try:
            pixels = playground.without(picture, place, _telling(progress))
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        yield {side: _shown(pixels, visible=True, label=f"without sentence {place + 1}"), state: "Done."}

    return leave_out


def _telling(progress: gr.Progress) -> Callable[[float, str], None]:
    return lambda share, what: progress(share, desc=what)


def serve(options: AppOptions) -> int:
    """Load the models, print the address, and answer until Ctrl-C or SIGTERM. UserError for wrong options, before any model is loaded
    where it can be known, and where nothing can listen there."""
    local = options.host in ("127.0.0.1", "localhost", "::1")
    token = options.token or (None if local else secrets.token_urlsafe(24))
    if token is not None and len(token) < LEAST_TOKEN:
        raise UserError(f"token= has {len(token)} characters; expected at least {LEAST_TOKEN}, or none for one by lot.")
    requests = [one for file in split_list(options.examples) for one in read_prompts(prompt_file=file)]
    short = [one for one in requests if len(one.prompt) <= options.max_characters]
    with listen(options.host, options.port) as probe:  # what is wrong with it is said before models load
        port = probe.getsockname()[1]
    sources, folder = sources_of(options), Path(options.output_dir)
    refusal = f"another command is drawing into {folder}; choose another output_dir=."
    with stop_on_signals() as stop, locked(folder.resolve(), refusal):
        playground = Playground(sources, folder, options.clip, options.max_side, options.max_characters)
        page = make_page(playground, short)
        names = names_of(split_list(options.hosts))
        page.queue(max_size=16).launch(
            server_name=options.host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False,
            auth=None if token is None else (USER, token), show_error=True, max_file_size="1kb", run_history=False,
            app_kwargs={"middleware": [Middleware(Hosts, allowed_hosts=names, www_redirect=False)]}, footer_links=[],
            theme=_THEME, enable_monitoring=False, pwa=False, mcp_server=False,
        )  # fmt: skip
        entry = "" if token is None else f"\nuser {USER}, password {token}; unencrypted: who reads it can draw here."
        print(f"{address_of(options.host, port)}{entry}", flush=True)
        while stop.came_at is None:
            time.sleep(0.2)
        page.close(verbose=False)
        print("ended;", *(f"pictures are in {one}, see index.html" for one in playground.finish()), flush=True)
    return 0
