#!/bin/bash
# Full fine-tuning on two nodes of eight GPUs:  sbatch examples/slurm.sh configuration/train/full_8gpu.yaml [key=value …]
# Submitted again after a time limit or a failure, it goes on from the newest whole checkpoint.
#SBATCH --job-name=moshi-ttt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=runs/slurm-%j.log
#SBATCH --requeue
set -euo pipefail

GPUS=8
export MAIN_ADDRESS MAIN_PORT=29500
MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MAIN_ADDRESS=${MAIN_ADDRESS%%$'\n'*}    # the first; `head` would break scontrol's pipe, and pipefail the job
export OMP_NUM_THREADS=8

# one launcher a node; each finds its rank in SLURM_NODEID
srun --kill-on-bad-exit=1 bash -c '
  accelerate launch \
    --config_file configuration/accelerate/fsdp2_multi_node.yaml \
    --num_machines "$SLURM_JOB_NUM_NODES" \
    --num_processes $(( SLURM_JOB_NUM_NODES * '"$GPUS"' )) \
    --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN_ADDRESS" --main_process_port "$MAIN_PORT" \
    examples/finetune.py "$@"' launch "$@"
