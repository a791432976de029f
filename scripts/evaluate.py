"""Judge a model on long prompts: draw a suite's prompts, score the pictures, and write a report.

    python scripts/evaluate.py ckpt=runs/nano suite=scenes
    python scripts/evaluate.py compare=[runs/nano/stage1,runs/nano/stage2,runs/nano/stage3] suite=[scenes,paraprompts]
    python scripts/evaluate.py pipeline=stabilityai/sdxl-turbo suite=dpg images_per_prompt=4 vlm=qwen3_vl_8b
    python scripts/evaluate.py images=pictures/other suite=paraprompts clip=ViT-L-14-quickgelu:openai
    torchrun --nproc_per_node 8 scripts/evaluate.py ckpt=weights suite=paraprompts

Run the same command again after a stop of any kind: it goes on where it was, and draws and asks nothing twice. Each evaluation
(one model, one suite) has a folder: images/, scores/, evaluation.json, report.html, report.md. It is <stage>/evaluation/<suite>
for a training stage (for a step named by ckpt=.../checkpoints/step_000400, <stage>/evaluation/step_000400/<suite>), else
runs/evaluation/<name>/<suite>; with count= the suite's name has _count<N> behind it. When a stage was trained on, what its
earlier step gave is moved to the folder of that step. A comparison lies in <run>/evaluation/<suite>, or in
runs/evaluation/<names>.

What is judged, one of:
ckpt=            a run, a stage, a checkpoint or a weights folder (ours, or in the official layout: unet=unet_384 chooses a U-Net), or hf://USER/NAME
pipeline=        a folder of diffusers or an id on the hub; from safetensors, without remote code
images=          a folder of pictures named after the prompts: their id, their row in the whole suite (00000), or its own file
                 name, with _1 or -1 for further ones; or a folder that sample.py drew. What is missing or broken counts as a failure
compare=         [a,b,c], each one of these (hub:<id> for a pipeline on the hub) or the folder of an evaluation made before;
                 [ours=runs/a,theirs=pictures/b] gives them names
label=           what reports call it; output_dir= where the evaluation (with compare=, the comparison) is written; with several
                 suites each has a folder inside
On what:
suite=           {suites}; or [several];
                 or a folder of .txt, a .txt, .csv or .jsonl file as sample.py takes it, or a .yaml of your own
suite_path=      where the suite's files lie, if not where configs/suites.yaml says ('{{paraprompts: <path>}}' with several suites);
                 `python scripts/download.py` says how to get them; allow_other=true accepts others than the released ones;
                 suite_options='{{...}}' over those of the suite's entry
count=           that many prompts, spread evenly; images_per_prompt=1 (images=: as many as there are). Image j of a prompt has the
                 same seed for every model
Drawing, as in sample.py:
steps= guidance= sampler= solver= guidance_rescale= guidance_start= guidance_stop=
guidance_sigma_min= guidance_sigma_max= score_bins= negative_prompt= height= width= batch_size=16
device= dtype=auto threads= compile= channels_last= offload_text_encoder= vae_tiling= text_encoder.path= text_encoder.dtype=
codec.path= codec.dtype=
Scores:
scores=auto      or [names]: scenes, sentences, counterfactual, segments, checklist, dpg, dpg_corrected, caption_back, fid,
                 kid, clip_fd. auto takes all that what is given allows, and the report says what the others need
clip=            open_clip model, <model>:<tag or file>, hf-hub:<id> or a folder; clip_precision=fp32|bf16|fp16
inception=       file of the FID's own Inception weights, pt_inception-2015-12-05 as pytorch-fid releases them; reference= folder
                 of real pictures, or a .npz of their statistics
vlm=             vision-language model: a name of configs/captioners.yaml, a hub id or a folder; vlm_revision= vlm_dtype=auto
                 vlm_batch_size=8; or endpoint=http://localhost:8000/v1 with served=<its model> api_key_env=<variable> concurrency=32
engine=          who asks it: transformers, vllm (for GPUs; concurrency= questions at once) or endpoint (where endpoint= is given)
text_embedding=  model for the caption-back score, a folder or a hub id
counterfactual=  prompts that are drawn again without each of their sentences (20 on scenes; 0: none)
agreement=       file of pairs with people's votes (.csv of scripts/vote.py, or .jsonl), for compare=: how often each score
                 agrees with them
runner=          local, or ray: workers of a Ray cluster draw and judge together, as torchrun's processes do (docs/cluster.md);
                 runner_options='{{address: auto, workers: 8, cpus: 4, gpus: 1}}'
votes=           results.json of a study of scripts/vote.py, for the report of compare=; baseline= the label that differences are
                 taken to (default: the first)
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paradiffusion.compose import compose_options, compose_sample
from paradiffusion.entry import run
from paradiffusion.evaluation.evaluate_options import DRAWING, EvaluateOptions
from paradiffusion.evaluation.suites.load import load_suite, suites


def main(arguments: list[str]) -> int:
    """Evaluate what ``arguments``, of the form key=value, ask for; the exit status."""
    options = compose_options(EvaluateOptions, arguments)
    if options.sampler is not None:
        named = compose_sample(["ckpt=suite", "prompt=suite", f"sampler={options.sampler}"])
        for key in DRAWING:
            if getattr(options, key) is None:
                setattr(options, key, getattr(named, key))
    options.check()
    chosen = [
        load_suite(name, options.suite_paths().get(name), options.count, options.allow_other, options.of_suite())
        for name in options.suites()
    ]
    from paradiffusion.evaluation.evaluate import evaluate  # it imports torch: a wrong key is answered before that

    return evaluate(options, chosen)


if __name__ == "__main__":
    run(main, lambda: (__doc__ or "").format(suites=", ".join(suites())))
