#!/bin/bash
# Full fine-tuning on two nodes of eight GPUs:  sbatch examples/slurm.sh configuration/train/full_8gpu.yaml [key=value …]
# Ten minutes before its time limit the run finishes its step and saves, and the job is put in the queue again; submitted again after a
# failure, it goes on from the newest whole checkpoint.
#SBATCH --job-name=moshi-ttt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --output=runs/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail

GPUS=8
export MAIN_ADDRESS MAIN_PORT=29500
MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MAIN_ADDRESS=${MAIN_ADDRESS%%$'\n'*}    # the first; `head` would break scontrol's pipe, and pipefail the job
export OMP_NUM_THREADS=8

stopped=
trap 'stopped=1; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1    # the time is nearly over: tell the processes of all nodes

# one launcher a node; each finds its rank in SLURM_NODEID. The launchers pass over the signal, which their processes take.
srun --kill-on-bad-exit=1 bash -c '
  trap "" USR1
  exec accelerate launch \
    --config_file configuration/accelerate/fsdp2_multi_node.yaml \
    --num_machines "$SLURM_JOB_NUM_NODES" \
    --num_processes $(( SLURM_JOB_NUM_NODES * '"$GPUS"' )) \
    --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN_ADDRESS" --main_process_port "$MAIN_PORT" \
    examples/finetune.py "$@"' launch "$@" &
job=$! code=0
wait "$job" || code=$?
if [[ -n $stopped ]]; then              # `wait` ended with the signal; the processes are still saving
  wait "$job" || code=$?
  (( code == 0 )) || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
