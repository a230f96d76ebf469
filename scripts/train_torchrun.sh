#!/bin/sh
# One node of a run under torchrun; start it on every node, NODE_RANK counting from 0.
#
#   NODES=2 NODE_RANK=0 MASTER_ADDR=node0 GPUS=8 sh scripts/train_torchrun.sh --config configs/llava-1.5-7b/ft-64.yaml key=value …
#
# No shared file system is needed for results: rank 0 on node 0 alone reads and writes output_dir. Model and data have to be
# at the same place on every node. Exit code 75 means "saved after a signal": start the same command again.
set -eu
: "${NODES:=1}" "${NODE_RANK:=0}" "${MASTER_ADDR:=127.0.0.1}" "${MASTER_PORT:=29500}" "${GPUS:=gpu}"
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
exec torchrun --nnodes "$NODES" --node_rank "$NODE_RANK" --nproc_per_node "$GPUS" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" train.py "$@"
