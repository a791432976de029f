#!/usr/bin/env bash
# What one GPU can show in eight minutes, with random weights at the paper's size: nothing is downloaded. Most worth first; each row
# is written as it ends, to benchmarks/GPU_*.md and .json, and LIMIT seconds (default 470) end the rest, which is named.
#
#   bash benchmarks/gpu.sh                # PYTHON=python LIMIT=470 OUTPUT=benchmarks SMALL= (1: tiny models, to try the script)
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
output=${OUTPUT:-benchmarks} limit=${LIMIT:-470}
export HF_HUB_OFFLINE=1 PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

device=$("$python" -c 'import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu")') || exit 2
name=$(tr -cs '[:alnum:]\n' _ <<<"${device,,}")
status=0 folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 130' INT
model=(preset=paper) rounds=(warmup=2 repeats=6) side=(512 1024) steps=25 nano=()
if [ -n "${SMALL:-}" ]; then
  model=(preset=nano text_encoder=tiny unet=tiny) rounds=(warmup=1 repeats=1) side=(32 64) steps=2
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
  measure "$1" "$python" scripts/benchmark.py "${model[@]}" "${rounds[@]}" output="$output" name="${name}_$2" "${@:3}"
}

on_gpu() {  # of what a processor cannot do
  if [ "$device" = cpu ]; then echo "== $1: left out, it needs a GPU"; else benchmark "$@"; fi
}

measure "tests on a real GPU" env CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" "$python" -m pytest -q -n0 tests/gpu/test_real_gpu.py tests/gpu/test_eight_bits.py
benchmark "stage 1 and its switches" stage1 what=step stages=1 resolution="${side[0]}" conditioning.mask_padding=true switches=channels_last,fused
benchmark "stage 2, recomputed" stage2 what=step stages=2 resolution="${side[0]}" conditioning.mask_padding=true switches=none
benchmark "stage 2, all activations kept" stage2_kept what=step stages=2 resolution="${side[0]}" conditioning.mask_padding=true switches=none gradient_checkpointing=false
benchmark "pictures" sampler what=sampler resolution="${side[1]}" steps="$steps" conditioning.mask_padding=true switches=none
benchmark "stage 3" stage3 what=step stages=3 resolution="${side[1]}" conditioning.mask_padding=true switches=none
benchmark "stage 1, lengths in multiples of 64" stage1_64 what=step stages=1 resolution="${side[0]}" conditioning.mask_padding=true conditioning.pad_multiple=64 switches=none
small_card=(recipe=24gb text_encoder.quantization=null optimizer.name=adamw conditioning.mask_padding=true) # random weights are not quantised
benchmark "24 GB: micro-batches of 1" recipe_1 what=step stages=2 "${small_card[@]}" micro_batch_size=1 switches=none
benchmark "24 GB: micro-batches of 8" recipe_8 what=step stages=2 "${small_card[@]}" micro_batch_size=8 switches=none
on_gpu "stage 1, compiled" stage1_compiled what=step stages=1 resolution="${side[0]}" conditioning.mask_padding=true switches=compile
on_gpu "pictures, compiled" sampler_compiled what=sampler resolution="${side[1]}" steps="$steps" conditioning.mask_padding=true switches=compile
if [ "$device" = cpu ] || "$python" -c 'import torchao' 2>/dev/null; then
  on_gpu "stage 1, language model in fp8" stage1_fp8 what=step stages=1 resolution="${side[0]}" conditioning.mask_padding=true text_encoder.quantization=fp8 switches=none
else
  echo "== stage 1, language model in fp8: left out, torchao is not installed"
fi
measure "nano's stage 1, to its scores" "$python" train.py stage=1 run_dir="$folder/nano" "${nano[@]}"
exit $status
