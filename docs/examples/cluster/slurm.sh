#!/usr/bin/env bash
# A conversion on the nodes of a Slurm job, with the options of dsv4convert as the arguments:
#     sbatch --nodes=8 slurm.sh hf-to-gguf /models/DeepSeek-V4-Pro /models/pro.gguf --recipe q2_k
#SBATCH --job-name=dsv4convert
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --requeue
set -euo pipefail

# Those who reach the ports must know the token.
umask 077
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$PWD/ray-token-$SLURM_JOB_ID"
od -An -N16 -tx1 /dev/urandom | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
read -r address _ < <(getent ahostsv4 "$head")
port=$((20000 + SLURM_JOB_ID % 10000))
cleanup() {
    kill $(jobs -p) 2> /dev/null || true
    wait
    rm -f "$RAY_AUTH_TOKEN_PATH"
}
trap cleanup EXIT

start() { exec srun --overlap --ntasks-per-node=1 "$@" --num-cpus="$SLURM_CPUS_ON_NODE" --disable-usage-stats --block; }

start --nodes=1 --nodelist="$head" \
    ray start --head --node-ip-address="$address" --port="$port" --include-dashboard=false &
export RAY_ADDRESS="$address:$port"
for _ in $(seq 60); do
    (exec 3<> "/dev/tcp/$address/$port") 2> /dev/null && break
    sleep 1
done
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    start --nodes=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" ray start --address="$RAY_ADDRESS" &
fi

# Nodes that join later get work as they come. After a requeue the run goes on where it was.
dsv4convert "$@" --workers ray:auto --resume
