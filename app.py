"""The playground: a paragraph drawn in the browser, and each of its sentences in a colour that says how well the picture follows it.

    python app.py                                                # data/nano, on this machine alone
    python app.py ckpt=runs/nano clip=ViT-B-32/openai
    python app.py pipeline=stabilityai/sdxl-turbo device=cuda
    python app.py compare=[runs/nano/stage1,runs/nano/stage3]    # the same seeds, side by side

It prints an address and answers until Ctrl-C. A sentence that says colour, shape and place of the built-in scenes is judged from
the pixels; another by leaving it out of the same seed: by what becomes of its CLIP score where clip= is given, else by whether
anything changes. A click on a sentence shows the picture without it.

ckpt= pipeline= compare=   a model of ours (a run, a stage, a checkpoint, the official weights), a diffusers pipeline (a folder or
                   an id on the hub), or two of them (hub:<id> for one on the hub); default ckpt=data/nano
clip=              a CLIP, as evaluate.py takes it
output_dir=        where pictures are saved with their settings, a folder a model (samples/playground)
examples=          prompt files whose lines are offered (default [data/prompts.txt,data/prompts_large.jsonl])
host= port=        where to listen: 127.0.0.1 (this machine only) and 7860 (0: any free one). Another host asks for a password:
token=             of 12 characters or more (default: drawn by lot, and printed)
hosts=             names that others open this machine under; addresses always hold
max_side= max_characters=   what is drawn at most (1024 pixels a side, 4000 characters)
unet= batch_size= device= dtype= threads= offload_text_encoder= vae_tiling= text_encoder.path= codec.path=   as sample.py has them
"""

from __future__ import annotations

import os

from paradiffusion.entry import run


def main(arguments: list[str]) -> int:
    """Serve the playground that ``arguments``, of the form key=value, ask for."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when it is imported
    from paradiffusion.apps.playground import AppOptions
    from paradiffusion.compose import compose_options

    options = compose_options(AppOptions, arguments)
    from paradiffusion.apps.playground_page import serve

    return serve(options)


if __name__ == "__main__":
    run(main, lambda: __doc__ or "")
