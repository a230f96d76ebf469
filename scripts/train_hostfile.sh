#!/bin/sh
# Several nodes under DeepSpeed's launcher with a hostfile (one "name slots=GPUs" a line).
#
# With password-less ssh between the nodes, once, on the first of them:
#   HOSTFILE=hosts sh scripts/train_hostfile.sh --config configs/llava-1.5-7b/ft-64.yaml key=value …
# Without ssh, on every node, NODE_RANK counting from 0 in the order of the hostfile:
#   HOSTFILE=hosts NODE_RANK=1 MASTER_ADDR=node0 sh scripts/train_hostfile.sh --config …
#
# No shared file system is needed for results: rank 0 alone reads and writes output_dir. Model and data have to be at the same
# place on every node.
set -eu
: "${HOSTFILE:?set HOSTFILE to a file with a line 'name slots=8' for each node}" "${MASTER_PORT:=29500}"
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
if [ -n "${NODE_RANK:-}" ]; then
    : "${MASTER_ADDR:?without ssh, set MASTER_ADDR to the first node}"
    exec deepspeed --hostfile "$HOSTFILE" --no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" \
        --master_port "$MASTER_PORT" train.py "$@"
fi
exec deepspeed --hostfile "$HOSTFILE" --master_port "$MASTER_PORT" train.py "$@"
