#!/bin/bash
# Cloud TPU VMs, one process a host; JAX asks the machines themselves who they are.
#   launch/tpu.sh NAME ZONE --config imdb_lm --workdir /shared/runs/imdb_lm
name=$1 zone=$2
shift 2
exec gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all --command "cd flax-lstm && python3 train.py $*"

# The same on GKE by xpk, from an image of launch/Dockerfile built with EXTRA=tpu:
#   xpk workload create --cluster CLUSTER --workload flax-lstm --tpu-type v5litepod-256 --docker-image IMAGE \
#     --max-restarts 20 --command "python train.py --config imdb_lm --workdir /runs/imdb_lm"
