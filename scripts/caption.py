"""Write long captions for the pictures of shards with a vision-language model: the way to a set such as ParaImage-Big.

    python scripts/caption.py shards='web/{00000..00099}.tar' output=captioned                      # Qwen3-VL-8B on one GPU
    accelerate launch scripts/caption.py shards=web output=captioned model=gemma3_12b               # one process a GPU
    python scripts/caption.py shards=web output=captioned engine=endpoint endpoint=http://localhost:8000/v1
    torchrun --nproc_per_node 4 scripts/caption.py shards=web output=captioned engine=endpoint endpoint=http://big:8000/v1  # 4 x 32
    python scripts/caption.py shards=web output=captioned judge=internvl3_5_8b                      # and check the claims

Run the same command again after a stop of any kind: it goes on after the last answer. In output: <shard>.tar, the shard with the
caption added; <shard>.jsonl, a line for each sample; report.json and report.md, with rates and what was rejected why.

shards=             tars, a folder of them, a glob or a range; allow_truncated=true takes those cut short
output=             the folder to write to; write=jsonl leaves the shards away (default write=shards)
kind=               the caption kind to write (long); prompts for it are in configs/caption_prompts.yaml
engine=             transformers (default: in this process), vllm (in this process, for GPUs) or endpoint (an OpenAI-compatible server)
model= revision=    a name of configs/captioners.yaml (default qwen3_vl_8b), a hub id, or a folder
dtype= device= batch_size=   auto|float32|bfloat16|float16; cuda:0, cpu; pictures at once per process (8)
endpoint= served= api_key_env=   the server's address, the model's name there, the variable that holds its key
concurrency=        questions at once, of vllm and of a server (32)
timeout= tries= retry_wait=   of requests to a server: seconds per answer (300), tries (8), first wait in seconds (1).
                    A process waits for the last answers of each shard: for a server that takes hundreds, start several processes
endpoint_gpus=      GPUs behind the endpoint, for captions per GPU-hour (0: unknown)
prompts=            templates by name, with weights if wanted: paper:3,spatial:1 (default: all of the kind)
prompt_file=        your own templates
image_side=         long side in pixels that the model is shown (default: the model's, else 1024)
temperature= top_p= max_new_tokens= seed=   0.7, 0.9, 768, 0; temperature=0 takes the likeliest token
language=           en (default) or any, for no check
min_words= max_words=   instead of the template's own limits
reject=             the checks that reject a caption (default: all but filler); the others are counted
retries=            how often a rejected caption is asked for again, with another template where there is one (1)
judge= judge_engine= judge_revision= judge_endpoint= judge_api_key_env= judge_share=   a second model (its name at the server,
                    with judge_engine=endpoint) that says yes or no to each sentence of a share of the captions (0.02)
runner=             local (default), or ray: workers of a Ray cluster take shard after shard (docs/cluster.md);
                    runner_options='{address: auto, workers: 8, cpus: 4, gpus: 1}', workers and what each asks for
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paradiffusion.compose import CONFIGS, compose_options
from paradiffusion.curation.captioning.caption_options import CaptionOptions, Template, check_output, load_templates
from paradiffusion.entry import run
from paradiffusion.errors import UserError

DONE, STOPPED, FAILED = 0, 1, 2


def main(arguments: list[str]) -> int:
    """Caption, judge if asked to, and report; the exit status."""
    options = compose_options(CaptionOptions, arguments)
    options.check()
    prompt_file = Path(options.prompt_file or CONFIGS / "caption_prompts.yaml").expanduser()
    templates = load_templates(prompt_file, options.kind, options.prompts)

    from paradiffusion.curation.captioning.captioning import check_names
    from paradiffusion.data.shards import expand_shards
    from paradiffusion.sampling.run import joined_processes
    from paradiffusion.stopping import stop_on_signals

    shards = expand_shards(str(options.shards), "shards")
    check_names(shards, options)
    check_output(Path(str(options.output)).expanduser(), options, templates)
    failure: UserError | OSError | None = None
    with stop_on_signals() as signal, joined_processes() as processes:
        processes.set_threads(None)
        status = DONE
        try:
            status = work_on(options, templates, shards[processes.rank :: processes.size], processes, signal.check)
        except (UserError, OSError) as error:
            processes.tell(error)
            status, failure = FAILED, error
        status = processes.agree(status)
        if processes.rank == 0:
            try:
                report(options, [shard.stem for shard in shards], workers_of(options, processes.size, len(shards)), status)
            except (UserError, OSError) as error:  # the disk that is full, say; the first failure is the one to tell
                processes.tell(error)
                failure = failure or error
        processes.agree(DONE)  # launchers end the others as soon as one has left with another status than 0
    if failure is not None and processes.size == 1:
        raise failure
    if failure is not None or status == FAILED:
        return FAILED
    return signal.status if status == STOPPED else 0


def work_on(options: CaptionOptions, templates: list[Template], shards: list[Any], processes: Any, check_stop: Callable[[], None]) -> int:
    """This process's shards (of Ray's workers all), with one model after the other."""
    from paradiffusion.curation.captioning.captioning import Captioner
    from paradiffusion.runner import make_bar, run_tasks
    from paradiffusion.stopping import Stopped

    if not shards:
        return DONE
    try:
        for judges in [False, True] if options.judge is not None else [False]:
            stage, ray = Captioner(options, templates, shards, judges), options.ray(options.engine_of(judges) != "endpoint")
            try:
                if ray is None:
                    _ = stage.opened  # before the bar: minutes of a download would count as slow pictures
                what, total = ("claims", 0) if judges else ("captions", len(stage.index))
                bar = make_bar(what, "img", total, shown=processes.rank == 0)
                run_tasks(bar, stage, range(len(shards)), check_stop, ray or 1)
            finally:
                stage.close()
    except Stopped:
        return STOPPED
    return DONE


def workers_of(options: CaptionOptions, processes: int, shards: int) -> int:
    """How many processes the time is of."""
    if (ray := options.ray(options.engine != "endpoint")) is None:
        return processes
    from paradiffusion.ray_pool import workers

    return workers(ray, shards)


def report(options: CaptionOptions, stems: list[str], processes: int, status: int) -> None:
    """Write the report of what is there, and say the main of it."""
    from paradiffusion.curation.captioning.caption_report import make_report, write_report

    output = Path(str(options.output)).expanduser()
    if not output.is_dir():
        return
    made = make_report(output, stems, min(processes, len(stems)), options.endpoint_gpus, options.judge is not None)
    page = write_report(made, output)
    if status == STOPPED:
        print("stopped; run the same command again to go on after the last answer.")
    rate = f", {made['captions_per_hour']:,.0f} captions per hour" if made["captions_per_hour"] else ""
    print(
        f"{made['shards_done']} of {made['shards']} shards: {made['captioned']} captions, {made['rejected_samples']:.1%} of the samples "
        f"rejected{rate}. See {page}."
    )


if __name__ == "__main__":
    run(main, lambda: __doc__ or "")
