#!/usr/bin/env bash
# `make slurm-demo`: the demo as Slurm jobs, on a mini cluster of its own that is gone afterwards.
#   demo.sh SEED RUN
set -euo pipefail
cd "$(dirname "$0")/../.."
seed=$1 run=$2
export PATH="$PWD/.venv/bin:$PATH"
mini=(python -m slurm.mini --name "demo-$$")
settings=(--set "run.seed=$seed" --set "run.name=$run")

"${mini[@]}" up --owner $$
trap '"${mini[@]}" down' EXIT
eval "$("${mini[@]}" env)"

rm -rf data/demo
dapo demo-data data/demo --seed "$seed"
srun --job-name=sft --partition=learner --cpus-per-task=2 --mem=8G dapo sft configs/demo.toml "${settings[@]}"
dapo submit configs/demo.toml --site slurm/sites/mini.toml "${settings[@]}"
squeue
dapo watch "runs/$run"
dapo status "runs/$run"
dapo report "runs/$run"
