#!/bin/bash
# Prepare recordings in 64 shares, one task each:  sbatch examples/slurm_prepare.sh recordings.jsonl kyutai-processor runs/codes
# A share that failed or ran out of time is submitted again by its number (sbatch --array=7 would count one task: use --shard 7/64 instead),
# and goes on where it was. When all are done, train with data.train=INDEX data.cache=runs/codes, where INDEX is what each share printed.
#SBATCH --job-name=moshi-prepare
#SBATCH --array=0-63
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=12:00:00
#SBATCH --output=runs/prepare-%A-%a.log
#SBATCH --requeue
set -euo pipefail

export OMP_NUM_THREADS=4
# each task finds its share in SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT
moshi-ttt prepare "$1" --processor "$2" --cache "$3" --device cuda --batch-size 16 --skip-bad --allow-outside "${@:4}"
