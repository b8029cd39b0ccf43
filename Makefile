# Each target works as the only command typed on a machine with Python 3.11 or later, make and git:
# it makes .venv first, with the releases in constraints.txt. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Tests run in this many processes. Two suit a laptop: compiling takes one core, running takes several.
JOBS ?= 2

# Training allocates and frees hundreds of megabytes a step. With huge pages, kept by the process, a step on 2 cores took
# a fifth to a third less time; only glibc reads this, everything else ignores it.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184

# Options of the quickstart: SMOKE=1 (under 3 minutes), SEED=n, RUN=directory, RESUME=1 (go on with an earlier run),
# DATA=folder of videos, or anything else that `dreamer4 data convert` reads, instead of recorded BabyAI.
RUN_FLAGS = $(if $(filter-out 0,$(SMOKE)),--smoke) $(if $(SEED),--seed=$(SEED)) $(if $(RUN),--run=$(RUN)) \
  $(if $(filter-out 0,$(RESUME)),--resume) $(if $(DATA),data.source="$(DATA)")

.PHONY: help install test test-slow lint format typecheck quickstart quickstart-seeds quickstart-full bench play constraints clean
.DEFAULT_GOAL := help

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' Makefile

install: $(READY) ## Make .venv and install the package with its development tools

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "dreamer4_jax needs Python 3.11 or later, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make $(or $(MAKECMDGOALS),install) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "'$(PYTHON) -m venv' failed. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

test: $(READY) ## Run the default tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-slow: $(READY) ## Run the tests that take minutes
	$(BIN)/python -m pytest -m 'slow or multiprocess or aot' -o faulthandler_timeout=3600 --durations 10 $(ARGS)

lint: $(READY) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY) ## Mend style and formatting where that can be done by machine
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(READY) ## Check types
	$(BIN)/mypy

quickstart: $(READY) ## Record play, train all phases, evaluate, report: 15 minutes on 2 cores (SMOKE=1: under 3)
	$(BIN)/dreamer4 run quickstart $(RUN_FLAGS)

quickstart-seeds: $(READY) ## The quickstart on SEEDS (0 1 2 3 4), results into experiments/results/quickstart
	$(BIN)/python -m experiments.quickstart_seeds $(if $(SEEDS),--seeds $(SEEDS))

quickstart-full: $(READY) ## The longer quickstart, at most 90 minutes on 2 cores
	$(BIN)/dreamer4 run quickstart --full $(RUN_FLAGS)

bench: $(READY) ## Measure training and generation speed against this machine's matmul rate (OUT=file keeps the figures)
	$(BIN)/dreamer4 bench $(if $(OUT),--out $(OUT))

play: $(READY) ## Play in the quickstart's world model in a browser (RUN=directory: another run's; PORT=n)
	$(BIN)/dreamer4 play $(or $(RUN),runs/quickstart-seed$(or $(SEED),0)) $(if $(PORT),--port $(PORT))

constraints: ## Renew constraints.txt from the newest releases that pyproject.toml allows
	rm -rf build/constraints
	$(PYTHON) -m venv build/constraints
	build/constraints/bin/python -m pip install --quiet -e '.[dev]'
	grep '^#' constraints.txt > build/constraints.txt
	build/constraints/bin/python -m pip freeze --exclude-editable | grep -E '^[A-Za-z0-9._-]+==' | sort -f \
	  >> build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf build/constraints

clean: ## Remove .venv and every cache; runs and data stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
