#!/bin/bash
# A Ray cluster over the nodes of a SLURM job, and a run on it: sbatch slurm.sh
#SBATCH --job-name=rlhf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
set -euo pipefail
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # since SLURM 22.05 a step without it gets one core

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # all names are read: who writes to a closed pipe ends the job
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
port=6379
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(openssl rand -hex 32)
export RAY_AUTH_TOKEN

# --block keeps each task, and with it the node, in the job
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
    ray start --head --node-ip-address="$address" --port="$port" --block &
sleep 20
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" --overlap \
        ray start --address="$address:$port" --block &
fi

# the folder of the run, and its OUTPUT, are on a file system that all nodes see; --launcher.wait lets late nodes join
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
    rlhf-run grpo --config run.toml \
    --launcher ray --launcher.address "$address:$port" --launcher.workers "${SLURM_JOB_NUM_NODES}x8" \
    --launcher.wait 600 --resume True
