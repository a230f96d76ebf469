#!/usr/bin/env bash
# Everything about speed and exactness that needs a GPU, in under nine minutes on one; ends in tables for docs/performance.md.
#   bash scripts/gpu_check.sh [--out FILE.json] [--only golden,gradients,encoder,prefill,train-7b,train-next,train-13b,peers]
#   bash scripts/gpu_check.sh --wheels FOLDER --only peers      beside TRL, from wheels carried along (docs/performance.md); not run on a GPU yet
# Needs torch, transformers and what visionzip/ itself imports. Models are built on the GPU with random weights.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$PYTHON" -m scripts.gpu_check "$@"
