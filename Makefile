# make demo       run the whole pipeline on the included demo model
# make test       lint, type check and all tests
# make test-real  run the whole pipeline on SmolLM2-135M, a pretrained instruct model (downloads 93 MB once)
# make test-vllm  load exports of many architectures, and adapters, in vLLM on the CPU
# make docs       build the documentation and the API reference in build/site

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= build/demo

.PHONY: demo docs test test-real test-vllm lint clean

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Broca needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: $(VENV)/installed
	$(BIN)/broca demo --out $(OUT)

docs: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	# A process with one thread for each core: the models are so small that more threads cost more than they bring.
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-real: $(VENV)/installed
	$(BIN)/python tests/real/make_model.py build/real/model
	REAL=build/real $(BIN)/pytest tests/real

test-vllm: $(VENV)/installed
	PYTHON=$(PYTHON) MAIN_PYTHON=$(BIN)/python bash tests/vllm/run.sh

clean:
	rm -rf build dist .venv .venv-vllm
