"""Draw images from a checkpoint.

    python sample.py ckpt=data/nano prompt="a red circle at the left of a blue square"
    python sample.py ckpt=runs/nano prompt_file=prompts.txt output_dir=out
    torchrun --nproc_per_node 2 sample.py ckpt=runs/nano prompt_file=cases.jsonl

Prompts come from .txt (one a line), .csv or .tsv (a prompt column), .json or .jsonl (prompt, seed, height, width, steps, guidance,
negative_prompt a line) or standard input (prompt_file=-). Images are written as 00000.png, ... in the order of the
prompts, with manifest.jsonl and a page, index.html. A run that was stopped goes on with the same command. All keys with
their defaults are in configs/sample.yaml.
"""

from __future__ import annotations

from paradiffusion.compose import compose_sample
from paradiffusion.entry import run


def main(arguments: list[str]) -> int:
    """Draw the images that ``arguments``, of the form key=value, ask for; the exit status."""
    config = compose_sample(arguments)
    from paradiffusion.sampling.run import sample  # it imports torch: a wrong key is answered before that

    return sample(config)


if __name__ == "__main__":
    run(main, lambda: __doc__ or "")
