# make demo | test | lint | docs: each sets up what it needs in .venv, once, and works offline from then on.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BOOK := examples/books/persuasion.txt
# torch for CUDA brings its own triton (so no constraint names one); torch for the CPU does not, and tests interpret the kernels
TRITON := triton==3.6.0

.PHONY: help setup demo test lint test-gpu sanitize-gpu bench-kernels clean

help:
	@echo "make demo   generate from a real book with the built-in pair: dense, then sparse at 10% kept"
	@echo "make test   run the test suite"
	@echo "make lint   ruff and mypy"
	@echo "make test-gpu, make sanitize-gpu, make bench-kernels   on a machine with a GPU, with its own python3, torch and triton"

setup: $(READY)

# torch goes first and pinned: the other packages then keep this build instead of fetching another
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Outrider needs Python 3.11 or newer, not " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV), once: downloads can take minutes"
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools \
		pytest pytest-xdist hypothesis ruff mypy numpy matplotlib prometheus-client transformers safetensors tokenizers typer rich pyyaml
	$(BIN)/python -c 'import sys, importlib.util as u; sys.exit(sys.platform == "linux" and u.find_spec("triton") is None)' \
		|| $(BIN)/python -m pip install --quiet --disable-pip-version-check $(TRITON)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $(READY)

demo: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/outrider generate --prompt-file $(BOOK) --prompt-tokens 16384 --max-new-tokens 128 \
		--mode dense --mode sparse --keep 0.1 --audit

test: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-gpu:
	PYTHONPATH=src $(PYTHON) -m pytest tests/kernels tests/gpu --kernel-summary benchmarks/results/kernel-matrix.jsonl

sanitize-gpu:
	PYTHONPATH=src compute-sanitizer --tool memcheck $(PYTHON) tests/gpu/sanitize.py
	PYTHONPATH=src compute-sanitizer --tool racecheck $(PYTHON) tests/gpu/sanitize.py

# make bench-kernels ARGS="--only sparse --peer-fa3 /tmp/fa3.so"
bench-kernels:
	PYTHONPATH=src $(PYTHON) -m benchmarks kernels $(ARGS)

clean:
	rm -rf $(VENV) build dist
