#!/usr/bin/env bash
# Train under Slurm: one task a GPU, on as many nodes as asked for. Arguments are those of train.py.
#
#   sbatch scripts/slurm.sh preset=paper stage=1 data.shards='/data/web/{00000..29999}.tar'
#   LAUNCH=zero2 sbatch --nodes=2 scripts/slurm.sh preset=paper stage=2 data.shards='/data/big/{00000..03299}.tar'
#
# LAUNCH: ddp (default), zero2, zero2_offload or zero3, as in configs/launch/. Ten minutes before the time limit Slurm sends
# SIGTERM straight to the training processes (no launcher between that would cut their time short): they save and leave.
# Longer runs are several submissions of the same command, each of which goes on where the one before stopped:
#
#   for _ in 1 2 3 4; do sbatch --dependency=singleton scripts/slurm.sh preset=paper stage=1 ...; done
#
#SBATCH --job-name=paradiffusion
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --output=%x-%j.log
set -euo pipefail

# Slurm runs a copy of this file, so the repository is where sbatch was called.
cd "${SLURM_SUBMIT_DIR:-.}"
if [ ! -f train.py ]; then
  echo "error: $PWD holds no train.py; call sbatch from the repository's root" >&2
  exit 2
fi
PYTHON="${PYTHON:-.venv/bin/python}"
LAUNCH="${LAUNCH:-ddp}"

export MASTER_ADDR MASTER_PORT
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"  # not head: it closes the pipe on a long list
MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))"

# What `accelerate launch --config_file configs/launch/$LAUNCH.yaml` would tell the processes.
case "$LAUNCH" in
  ddp) ;;
  zero2 | zero2_offload | zero3)
    export ACCELERATE_USE_DEEPSPEED=true
    export ACCELERATE_DEEPSPEED_ZERO_STAGE="${LAUNCH:4:1}"
    if [ "$LAUNCH" = zero2_offload ]; then export ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE=cpu; fi
    ;;
  *)
    echo "error: LAUNCH=$LAUNCH is unknown; choose one of ddp, zero2, zero2_offload, zero3" >&2
    exit 2
    ;;
esac

# --kill-on-bad-exit: when one process fails, the others need not wait for their time-out. --cpus-per-task: from 22.05 on srun
# does not take it over from sbatch, and would give each task one core.
exec srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} bash -c '
  export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID" LOCAL_WORLD_SIZE="$SLURM_NTASKS_PER_NODE"
  exec "$0" train.py "$@"' "$PYTHON" "$@"
