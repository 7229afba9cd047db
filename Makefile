# `make demo`, `make test` and `make lint` make .venv on first use; nothing else is needed but Python 3.11.
#
#   TORCH_BUILD   build of torch to take: cpu (default), cu126, cu128, ... ; empty for the plain release, which on Linux
#                 brings the CUDA packages
#   TORCH_INDEX   package index that holds that build, where pip's own configuration names none (PyTorch's install page
#                 shows it for each build)
#                 e.g.  make demo TORCH_BUILD=cu128 TORCH_INDEX=...
#   PYTHON        the interpreter that .venv is made with
#   JOBS          pytest workers

PYTHON ?= python3.11
TORCH_BUILD ?= cpu
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp-$(or $(TORCH_BUILD),plain)
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
# macOS wheels carry no local version: there the plain release is the CPU build.
TORCH_LOCAL := $(if $(and $(TORCH_BUILD),$(filter-out Darwin,$(shell uname -s))),+$(TORCH_BUILD))
TORCH := torch==$(TORCH_VERSION)$(TORCH_LOCAL)

.PHONY: demo test zoo cells lint typecheck format clean

demo: $(STAMP)
	$(BIN)/qgraph demo $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

# Every model of tests/zoo, each in a process of its own: minutes. ARGS="--check capture,compile,export" for all checks.
zoo: $(STAMP)
	$(BIN)/python -m tests.zoo.run --jobs $(JOBS) --json zoo.json $(ARGS)

# Every cell of the export (hours), or those that ARGS names: ARGS="--pairs --layer conv2d". A stopped run goes on.
cells: $(STAMP)
	$(BIN)/python -m tests.exporters.cells --jobs $(JOBS) --json cells.jsonl $(ARGS)

lint: $(STAMP) typecheck
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# The type checker reads the package as it is installed, not the three source folders.
typecheck: $(STAMP)
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/installed .
	cd build/installed && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p qgraph

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info

# torch first, in the build asked for, so that no other package pulls a different one.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(addprefix --extra-index-url ,$(TORCH_INDEX)) "$(TORCH)" || { echo \
	  "$(TORCH) is on no configured index: pass TORCH_INDEX=<PyTorch's index of $(TORCH_BUILD) builds>," \
	  "or TORCH_BUILD= for the plain release."; exit 1; }
	$(BIN)/pip install --quiet "setuptools>=77.0.3" wheel
	$(BIN)/pip install --quiet --no-build-isolation -c constraints.txt -e ".[demo,test,lint,runtimes]"
	touch $@
