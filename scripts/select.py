"""Make a small set of chosen pictures with good descriptions out of shards: score, choose, review, export.

    python scripts/select.py action=score folder=small shards='big/*.tar' aesthetic=sa_0_4_vit_l_14_linear.pth
    python scripts/select.py action=choose folder=small min='{aesthetic: 5.5, short_side: 768}' count=3000 clusters=300 \\
        max_similarity=0.95
    python scripts/select.py action=review folder=small              # prints an address to open; Ctrl-C ends it
    python scripts/select.py action=export folder=small output=small_shards

folder= is where everything about one selection lies; each step reads what the one before left there. Shards that were
moved since, or are mounted elsewhere: shard_root=<folder> once, in any step, says where they are (scoring.json has where
they were).

score: CLIP features, and per image width, height, short_side, aspect, sharpness (variance of the Laplacian at 512 px), noise
    (grey levels), brightness, contrast, clipped_dark and clipped_bright (shares), border (share in uniform bars),
    jpeg_quality (JPEG only), words, agreement_mean and agreement_min (CLIP, by sentence of the caption), sentences,
    cut_sentences; aesthetic with aesthetic=, text_area with text_detector=. Goes on where it stopped.
    shards=            tars, folders, globs or ranges {00000..00099}.tar
    clip=              <model>:<tag or file of weights>, hf-hub:<id>, or a folder (default ViT-L-14-quickgelu:openai)
    aesthetic=         file of a head on its features, .safetensors or .pth: LAION's linear one, its MLP, or your own
    text_detector=     folder of a transformers model for object detection or semantic segmentation that finds text or
                       watermarks; text_labels='[watermark]' of its classes (default all), text_threshold=0.3
    caption=           kind whose agreement is measured (default: each sample's longest)
    processes=         default: one for each GPU; device=auto|cpu|cuda|cuda:N precision=fp32|bf16|fp16 batch_size=32
                       threads=4 (decoding, in each process) allow_truncated=false
    runner=            local, or ray: workers of a Ray cluster take shard after shard (docs/cluster.md);
                       runner_options='{address: auto, workers: 8, cpus: 4, gpus: 1}'
choose: writes candidates.jsonl, and choice.json with what each threshold removed.
    min= max=          thresholds by score, such as min='{aesthetic: 5.5}' max='{border: 0.05, text_area: 0.02}'
    weights=           of the scores' ranks, negative where less is better (default {aesthetic: 1})
    count=             at most so many; clusters=1 groups of alike pictures to take from in turn; per_cluster= at most so
                       many of each; max_similarity= cosine above which two are the same; seed=0
review: a page for one candidate at a time: k keeps, d drops, u undoes, e edits, g goes to a number. Each decision is in decisions.jsonl, on disk, before the next is shown; closing
    the tab, reloading or ending the server loses nothing.
    host=127.0.0.1 port=8765 (0: any free one) reviewer=<name> (default: of your account; can be changed in the page)
export: what was kept, as shards with the description as caption kind "clean" and its scores in the JSON, kept.jsonl and report.json.
    output=            new folder; samples_per_shard=1000
    votes=             majority (default), any or all: what several reviewers' decisions come to
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "select":
    # `import select` in another program of this folder means the standard library's module, which this file hides there.
    from importlib.machinery import BuiltinImporter, PathFinder
    from importlib.util import module_from_spec

    _elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    _spec = BuiltinImporter.find_spec("select") or PathFinder.find_spec("select", _elsewhere)
    if _spec is None or _spec.loader is None:
        raise ImportError("the standard library's module select is missing")
    sys.modules["select"] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["select"])
else:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

    from paradiffusion.entry import run

    def main(arguments: list[str]) -> int:
        """Do the step that ``action=`` names."""
        from paradiffusion.compose import compose_options
        from paradiffusion.curation.choosing.select_steps import SelectOptions, run_step

        options = compose_options(SelectOptions, arguments)
        options.given = [argument.partition("=")[0] for argument in arguments]
        options.check()
        return run_step(options)

    if __name__ == "__main__":
        run(main, lambda: __doc__ or "")
