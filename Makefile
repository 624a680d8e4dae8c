# `make` alone lists the targets.

PYTHON  ?= python3
WORKERS ?= 2
VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed

# Once installed, no model hub is asked and no newer tools are looked for.
demo test bench: export HF_HUB_OFFLINE := 1
demo test bench lint: export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help install demo lint test bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv and install the project with its development tools

$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || \
		{ echo "'$(PYTHON)' was not found; Python 3.11 or newer is needed (make install PYTHON=...)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; this is $$("$(PYTHON)" --version) (make install PYTHON=...)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "'$(PYTHON)' cannot make virtual environments; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

demo: install ## run the whole pipeline on the tiny embedded model and write demo/
	$(BIN)/atp demo --out demo

lint: install ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: lint ## lint, then run every test (WORKERS=2 at a time, one thread each)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS)

bench: install ## run the benchmarks and write bench.json
	$(BIN)/python -m tests.benchmarks --out bench.json

clean: ## remove what the other targets made, but neither .venv nor runs/
	rm -rf demo bench.json build dist .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
