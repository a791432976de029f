#!/usr/bin/env bash
# What one GPU can show in eight minutes, with random weights at the paper's size: nothing is downloaded. Most worth first; each row
# is written as it ends, to benchmarks/GPU_*.md and .json, and LIMIT seconds (default 470) end the rest, which is named. How many
# rows that reaches no GPU has shown yet; LIMIT=3600 leaves time for all.
#
#   bash benchmarks/gpu.sh                # PYTHON=python LIMIT=470 OUTPUT=benchmarks SMALL= (1: tiny models, to try the script)
#   PYTHON='python tests/support/pretending.py' SMALL=1 bash benchmarks/gpu.sh       # on the pretended GPU of the tests
#
# What is switched where ("on | off"; a row's files end in the name of it; within one row both run in turn):
#   reads once a step       stage3: ours | numbers read in each micro-batch, copies waited for
#   recomputation           stage2 | stage2_half | stage2_kept
#   language model          stage1_compiled: compile=true | ours; stage2_kept: ours | adapters' inputs cast;
#                           stage3: ours | null prompt read beside the others; stage1_fp8 | stage1
#   U-Net                   stage1_compiled: compile=true (with channels_last) | ours; stage1: channels_last=true | ours, AdamW fused |
#                           default, ours | cudnn.benchmark off; stage1_64 | stage1; stage2_kept | stage2_fixed (expandable_segments)
#   recipe=24gb             recipe_8 | recipe_1; recipe_8: ours | frozen matrices in fp32
#   checkpoints beside steps   saves: async_save=true | async_save=false
#   caches                  stage1, stage3: features and latents given | ours; stage2_kept: latents given | ours
#   sampler                 sampler: sampler=fast | sampler=paper | reference; sampler_compiled: compile=true, CUDA graphs | ours
set -uo pipefail
cd "$(dirname "$0")/.."
read -ra python <<<"${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}"
output=${OUTPUT:-benchmarks} limit=${LIMIT:-470}
export HF_HUB_OFFLINE=1

device=$("${python[@]}" -c 'import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu")') || exit 2
name=$(tr -cs '[:alnum:]\n' _ <<<"${device,,}")
status=0 folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 130' INT
model=(preset=paper) rounds=(warmup=2 repeats=4) side=(512 1024) steps=25 nano=()
# A quarter of the paper's U-Net: 5 GB a checkpoint instead of 20.
saved=(text_encoder=tiny 'unet.arguments.block_out_channels=[192,384,576,768]')
if [ -n "${SMALL:-}" ]; then
  model=(preset=nano text_encoder=tiny unet=tiny) rounds=(warmup=0 repeats=1) side=(32 64) steps=2 saved=()
  nano=(text_encoder=tiny unet=tiny max_steps=2 batch_size=2 validation.scenes=2 validation.unseen=0 validation.samples=2 sampler.steps=2)
  nano+=(data.demo_folder="$folder/demo" "data.demo_sizes={web: 24, big: 24, small: 24, val: 24}")
elif [ "$device" = cpu ]; then
  echo "error: torch finds no GPU here; run it where one is, or SMALL=1 to try the script." >&2
  exit 2
fi

measure() {  # TITLE COMMAND...: in what time is left
  local left=$((limit - SECONDS)) title=$1
  shift
  if ((left < 10)); then
    echo "== $title: left out, $limit s are over"
    return
  fi
  echo "== $title ($left s left)"
  timeout --foreground --signal=INT --kill-after=20 "$left" "$@" || { echo "== $title: ended with status $?"; status=1; }
}
benchmark() {  # TITLE NAME OVERRIDES...
  measure "$1" "${python[@]}" scripts/benchmark.py "${model[@]}" "${rounds[@]}" output="$output" name="${name}_$2" "${@:3}"
}
step() {  # TITLE NAME STAGE OVERRIDES...: of the masked arm
  benchmark "$1" "$2" what=step stages="$3" conditioning.mask_padding=true "${@:4}"
}
unless() {  # DEVICES (a pattern) TITLE...: COMMAND TITLE..., but where it could show nothing
  if [[ $device == $1 ]]; then echo "== $3: left out, it needs more than a $device"; else "${@:2}"; fi
}
neither='@(cpu|pretended GPU)'

unless "$neither" measure "tests on a real GPU" env CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" "${python[@]}" -m pytest -q -n0 tests/gpu/test_real_gpu.py tests/gpu/test_eight_bits.py
step "stage 1 and its switches" stage1 1 resolution="${side[0]}" switches=channels_last,fused,cudnn_benchmark
step "stage 2, recomputed" stage2 2 resolution="${side[0]}" switches=none
step "stage 2, all activations kept" stage2_kept 2 resolution="${side[0]}" gradient_checkpointing=false switches=adapter_casts
unless 'pretended GPU' benchmark "pictures" sampler what=sampler resolution="${side[1]}" steps="$steps" conditioning.mask_padding=true switches=none
step "stage 3 and its switches" stage3 3 resolution="${side[1]}" switches=reads,null_prompt
small_card=(recipe=24gb text_encoder.quantization=null optimizer.name=adamw) # random weights are not quantised
step "24 GB: micro-batches of 8" recipe_8 2 "${small_card[@]}" micro_batch_size=8 switches=frozen_fp32
step "24 GB: micro-batches of 1" recipe_1 2 "${small_card[@]}" micro_batch_size=1 switches=none
unless 'pretended GPU' step "checkpoints beside the steps, or waited for" saves 3 resolution="${side[0]}" "${saved[@]}" keep_last=1 switches=async_save
unless "$neither" step "stage 1, compiled" stage1_compiled 1 resolution="${side[0]}" switches=compile
PYTORCH_ALLOC_CONF=expandable_segments:False PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False \
  unless "$neither" step "stage 2, without expandable segments" stage2_fixed 2 resolution="${side[0]}" gradient_checkpointing=false switches=none
unless "$neither" benchmark "pictures, compiled" sampler_compiled what=sampler resolution="${side[1]}" steps="$steps" conditioning.mask_padding=true switches=compile
unless 'pretended GPU' measure "nano's stage 1, to its scores" "${python[@]}" train.py stage=1 run_dir="$folder/nano" "${nano[@]}"
step "stage 1, lengths in multiples of 64" stage1_64 1 resolution="${side[0]}" conditioning.pad_multiple=64 switches=none
step "stage 2, every second layer recomputed" stage2_half 2 resolution="${side[0]}" gradient_checkpointing=half switches=none
if [[ $device == $neither ]] || "${python[@]}" -c 'import torchao' 2>/dev/null; then
  unless "$neither" step "stage 1, language model in fp8" stage1_fp8 1 resolution="${side[0]}" text_encoder.quantization=fp8 switches=none
else
  echo "== stage 1, language model in fp8: left out, torchao is not installed"
fi
exit $status
