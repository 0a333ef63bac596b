# Bare `make` lists the targets. Everything but `install` works without a network.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/latest
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# shards needs no .venv in an environment that has synthgen installed; demo does not trust any other program of that name
FOUND := $(if $(wildcard $(VENV)),,$(shell command -v synthgen))

.PHONY: help install check lint test slow ray demo shards fuzz faults bench clean
help:            ## list the targets
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/: .*## /\t/' | expand -t 14

install: $(STAMP)  ## make .venv with synthgen and everything it needs
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,tensorboard]'
	@touch $@

demo: $(STAMP)   ## prompts to encoder on the shipped model, in minutes; ends with a page to look at
	@$(BIN)/synthgen run pipelines/tiny.yaml
	@$(BIN)/synthgen view runs/tiny

shards: $(if $(FOUND),,$(STAMP)) ## training tars of RUN (runs/latest)
	@$(or $(FOUND),$(BIN)/synthgen) shards --run $(RUN)

test: $(STAMP)   ## the tests
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

slow: $(STAMP)   ## the slower tests, minutes in all
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m slow

ray: $(STAMP)    ## the tests of the Ray engine, with a machine lost in the middle (installs ray)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[ray]'
	$(BIN)/python -m pytest -q -rP -m ray tests/ray

fuzz: $(STAMP)   ## ten thousand hostile inputs over every reader (docs/security.md)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --inputs 10000 --seed 0

faults: $(STAMP) ## a hundred kills, full disks, wrong bytes and failing requests; the bytes stay the same (docs/faults.md)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults --moments 100 --seed 0 --out benchmarks/results/faults.json

check: lint test ## what CI runs
lint: $(STAMP)   ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)  ## measure speed beside named alternatives; writes benchmarks/results
	for script in generate masks_speed shards pretrain; do OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$script.py || exit 1; done
	$(BIN)/python benchmarks/report.py

clean:           ## remove the environment; runs stay
	rm -rf $(VENV)
