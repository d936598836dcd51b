# make train and make test work on a fresh machine with Python 3.11, git and make.

PYTHON ?= python3.11
VENV ?= .venv
RECIPE ?= recipes/tiny-moe-cpu.yaml
PROCESSES ?= 2
ARGS ?=

STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

.PHONY: venv train test test-all lint bench

venv: $(STAMP)

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make venv: expected Python 3.11 or later as $(PYTHON); install it," \
			"or say which one: make venv PYTHON=/path/to/python3" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# For instance: make train ARGS="--loss_type grpo train.steps=3"
train: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone \
		--nproc-per-node $(PROCESSES) -m sapo_megatron train $(RECIPE) $(ARGS)

test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

test-all: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" $(ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: venv
	@set -e; for script in $(wildcard benchmarks/*.py); do \
		echo "== $$script"; $(BIN)/python $$script $(ARGS); done
