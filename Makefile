# make train and make test work on a fresh machine with Python 3.11, git and make.

PYTHON ?= python3.11
VENV ?= .venv
RECIPE ?= recipes/tiny-moe-cpu.yaml
PROCESSES ?= 2
ARGS ?=

STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# A file per core at a time: what its tests share, such as ranks, is made once.
CORES ?= 2
ALL_CORES := --numprocesses $(CORES) --dist loadfile

# The other release of megatron-core, and what of the tests make test runs on it.
MCORE_019 := venvs/mcore-0.19
MCORE_019_STAMP := $(MCORE_019)/.installed
ON_MCORE_019 := MEGATRON_CORE_VERSION=$(shell sed -n 's/^megatron-core==//p' \
	requirements-mcore-0.19.txt) PYTHONPATH="$(CURDIR)/$(MCORE_019)"
SLICE_FILES := $(patsubst %,tests/%.py, \
	contracts/test_contracts \
	policy/test_release policy/test_layers policy/test_delta_net policy/test_hostile objective/test_logprob rollout/test_generate policy/test_checkpoint policy/test_routers policy/test_families policy/test_matrix)
SLICE_LAYOUTS := TP2xPP2xEP2 or CP2xEP2xDP2 or PP2xVPP2xDP2 or CP2xDP2 or moe_act or 3-tuple or \
	balanced
SLICE ?= $(SLICE_FILES) -k "not (test_layout or killed or tensor_parallel or bfloat16) \
	or float64 and ($(SLICE_LAYOUTS))"

# The other generation of transformers, and the tests that are run on it.
TRANSFORMERS_4 := venvs/transformers-4
TRANSFORMERS_4_STAMP := $(TRANSFORMERS_4)/.installed
OF_FOLDERS := tests/hf tests/data/test_tokenizer.py tests/policy/test_weights.py

# The release for GPUs as it is meant to be installed, on Python 3.12: what requirements-gpu.txt has.
PYTHON312 ?= python3.12
PY312 := venvs/py312
PY312_STAMP := $(PY312)/.installed

# vLLM's build for CPUs, beside which torch's companions do not import.
VLLM := venvs/vllm
VLLM_STAMP := $(VLLM)/.installed

# Other projects' pipelines, which the patches are tested in.
HOSTS := venvs/hosts
HOSTS_STAMP := $(HOSTS)/.installed

BENCHMARKS := logprob loss step recording

.PHONY: venv train test torture test-mcore-0.19 test-transformers-4 test-py312 test-vllm test-hosts test-all lint docs bench

venv: $(STAMP)

$(STAMP): requirements.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make venv: expected Python 3.11 or later as $(PYTHON); install it," \
			"or say which one: make venv PYTHON=/path/to/python3" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# For instance: make train ARGS="--loss_type grpo train.steps=3"
train: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m sapo_megatron.launcher $(PROCESSES) \
		sapo_megatron train $(RECIPE) $(ARGS)

# All tests on the megatron-core of requirements.txt, then some of them on the other release; with
# ARGS, those tests on the first alone: make test ARGS="tests/objective/test_sapo.py -k gate"
test: venv $(if $(ARGS),,$(MCORE_019_STAMP) $(TRANSFORMERS_4_STAMP))
	$(PYTEST) $(or $(ARGS),$(ALL_CORES))
	$(if $(ARGS),,$(ON_MCORE_019) $(PYTEST) $(ALL_CORES) $(SLICE))

test-mcore-0.19: venv $(MCORE_019_STAMP)
	$(ON_MCORE_019) $(PYTEST) $(or $(ARGS),$(ALL_CORES) $(SLICE))

# The slice on Python 3.12; nothing where there is none.
test-py312: $(if $(shell $(PYTHON312) --version 2>/dev/null),$(PY312_STAMP))
ifneq ($(shell $(PYTHON312) --version 2>/dev/null),)
	MEGATRON_CORE_VERSION=$(shell sed -n 's/^megatron-core==//p' requirements-mcore-0.19.txt) \
		OMP_NUM_THREADS=1 $(PY312)/bin/python -m pytest $(or $(ARGS),$(ALL_CORES) $(SLICE) tests/test_cli.py)
else
	@echo "make test-py312: no Python 3.12 as $(PYTHON312); say which one: PYTHON312=/path/to/it"
endif

$(PY312_STAMP): requirements.txt requirements-mcore-0.19.txt
	rm -rf $(PY312)
	$(PYTHON312) -m venv $(PY312)
	sed '/^megatron-core==/d' requirements.txt > $(PY312)/requirements.txt
	$(PY312)/bin/python -m pip install --disable-pip-version-check \
		-r $(PY312)/requirements.txt -r requirements-mcore-0.19.txt
	@touch $@

test-transformers-4: venv $(TRANSFORMERS_4_STAMP)
	PYTHONPATH="$(CURDIR)/$(TRANSFORMERS_4)" $(PYTEST) $(or $(ARGS),$(ALL_CORES) $(OF_FOLDERS))

$(TRANSFORMERS_4_STAMP): requirements-transformers-4.txt | $(STAMP)
	rm -rf $(TRANSFORMERS_4)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --target $(TRANSFORMERS_4) -r $<
	@touch $@

test-all: venv $(MCORE_019_STAMP) $(TRANSFORMERS_4_STAMP)
	$(PYTEST) -m "slow or not slow" $(or $(ARGS),$(ALL_CORES))
	$(ON_MCORE_019) $(PYTEST) -m "slow or not slow" $(or $(ARGS),$(ALL_CORES))

# Kills, damage, mutations, bad data, hostile files and lost servers by the hundred: make torture SEED=1
torture: venv $(VLLM_STAMP)
	SAPO_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python OMP_NUM_THREADS=1 $(BIN)/python -m tests.torture $(SEED) $(ARGS)

$(MCORE_019_STAMP): requirements-mcore-0.19.txt | $(STAMP)
	rm -rf $(MCORE_019)
	$(BIN)/python -m pip install --disable-pip-version-check --ignore-requires-python --no-deps \
		--target $(MCORE_019) -r $<
	@touch $@

# Rollouts on real vLLM servers.
test-vllm: venv $(VLLM_STAMP)
	SAPO_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(PYTEST) $(or $(ARGS),tests/vllm)

$(VLLM_STAMP): requirements-vllm.txt pyproject.toml | $(STAMP)
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --disable-pip-version-check -r $<
	$(VLLM)/bin/python -m pip install --disable-pip-version-check --no-build-isolation -e '.[all]'
	$(VLLM)/bin/python -m pip check
	$(VLLM)/bin/python -m pip uninstall --disable-pip-version-check --yes \
		torchvision torchaudio torchcodec
	@touch $@

# The patches in the pipelines themselves: verl and ms-swift from PyPI, in an environment of theirs,
# and checkouts of the others that are named: make test-hosts SAPO_SLIME=/path/to/slime
CHECKOUTS := $(if $(SAPO_MEGATRON_LM),tests/hosts/test_megatron_rl.py) \
	$(if $(SAPO_SLIME)$(SAPO_MILES),tests/hosts/test_slime.py) \
	$(if $(SAPO_NEMO_RL),tests/hosts/test_nemo_rl.py)

test-hosts: $(HOSTS_STAMP) $(if $(strip $(CHECKOUTS)),venv)
	OMP_NUM_THREADS=1 $(HOSTS)/bin/python -m pytest --noconftest \
		$(or $(ARGS),$(patsubst %,tests/hosts/test_%.py,install verl ms_swift))
	$(if $(strip $(CHECKOUTS)),$(PYTEST) $(CHECKOUTS))

$(HOSTS_STAMP): requirements-hosts.txt
	rm -rf $(HOSTS)
	$(PYTHON) -m venv $(HOSTS)
	$(HOSTS)/bin/python -m pip install --disable-pip-version-check -r $<
	@touch $@

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck -x launch/*.sh launch/slurm.sbatch

# Pages that are made of the code, such as docs/recipe.md; tests compare them.
docs: venv
	$(BIN)/python -m tests.docs

# Tables on the screen, rows as JSON below runs/benchmarks. For instance: make bench ARGS=--full
bench: venv
	@set -e; for name in $(BENCHMARKS); do \
		echo "== $$name"; \
		$(BIN)/python -m benchmarks.$$name --out runs/benchmarks/$$name.json $(ARGS); done
