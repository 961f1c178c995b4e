# All commands of a checkout. They need git, Python >= 3.11, cargo and the package registries. As root on Debian, apt-get
# installs everything else. Elsewhere, targets list missing programs, and run without those that are optional.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

VENV := .venv
PYTHON := $(VENV)/bin/python
PYTEST_ARGS ?=
# One more process than cores, because tests wait now and then; not more, because some tests measure time.
WORKERS ?= $(shell echo $$(($$(nproc) + 1)))
PYTEST := scripts/pytest.sh $(PYTHON) $(WORKERS)

ENGINE_SOURCES := Cargo.toml Cargo.lock $(shell find crates -name '*.rs' -o -name Cargo.toml)
BENCHMARKS := $(subst _,-,$(patsubst benchmarks/%/__main__.py,bench-%,$(wildcard benchmarks/*/__main__.py)))

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: demo
demo: build system ## Migrate a running workload to another process and verify every write
	$(VENV)/bin/pageferry demo

.PHONY: demo-fleet
demo-fleet: build system ## Start a fleet of three hosts in network namespaces, clone a guest, and evacuate a host (root)
	$(VENV)/bin/python examples/fleet.py -- $$($(VENV)/bin/python -m tests.guest.payload) -m 64M -serial 'file:{folder}/{name}-{host}'

.PHONY: test
test: test-engine test-package ## Run the tests of the engine and the package (PYTEST_ARGS="-k name" selects)

.PHONY: test-engine
test-engine: build ## Run the tests of the engine
	cargo test --locked --workspace --quiet

.PHONY: test-package
test-package: build system ## Run the tests of the package: in parallel (WORKERS=N), then those that must run alone
	$(PYTEST) $(PYTEST_ARGS)

.PHONY: test-full
test-full: test-engine system ## Run the tests with every QEMU, on TCG and on KVM (two hours)
	$(PYTHON) -m pip install --quiet --require-hashes --only-binary :all: -r requirements-full.lock
	GUESTS=all $(PYTEST) $(PYTEST_ARGS)

.PHONY: faults
faults: build system ## Inject every failure at every point of a migration between two hosts (an hour)
	FAULTS=all $(PYTEST) tests/faults $(PYTEST_ARGS)

.PHONY: soak
soak: build system ## Migrate at random between three hosts under failures (SOAK_MINUTES=30, SOAK_SEED=N)
	$(PYTHON) -u -m tests.network.soak

.PHONY: lint
lint: build ## Check format, types, stubs, import rules and the length of functions
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(PYTHON) -m mypy.stubtest --allowlist scripts/stubtest.allow --ignore-unused-allowlist pageferry._engine
	$(VENV)/bin/lint-imports --no-cache --no-logo
	$(PYTHON) scripts/function_length.py
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets --quiet -- -D warnings

.PHONY: build
build: $(VENV)/.engine ## Create .venv and build the engine into it (release mode)

.PHONY: bench
bench: build system $(BENCHMARKS) ## Measure against peers; bench-NAME runs benchmarks.NAME alone

bench-%: build system
	$(PYTHON) -m benchmarks.$(subst -,_,$*)

.PHONY: systems
systems: build system ## Measure the ten systems, each with and without its mechanism
	$(PYTHON) -m benchmarks.systems

.PHONY: docs
docs: build ## Build the documentation into site/; warnings are errors
	$(VENV)/bin/mkdocs build --strict --quiet

.PHONY: manual
manual: build ## Generate man pages and shell completions from the parser
	$(PYTHON) scripts/manual.py

.PHONY: release
release: build ## Build and test the packages of a release in dist/: source, wheel, checksums
	$(PYTHON) scripts/release.py

.PHONY: pictures
pictures: build system ## Create the pictures of the documentation from the import contract and a run of the demo
	$(PYTHON) scripts/pictures.py

.PHONY: system
system: ## Install or fetch programs for guests (QEMU, busybox, iperf3, fio, a guest kernel) and tests (Chromium, Prometheus)
	@scripts/system.sh

.PHONY: clean
clean: ## Remove all built or fetched files
	rm -rf $(VENV) .cache target site dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src -name '*.so' -delete
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	scripts/venv.sh $(VENV)
	@touch $@

$(VENV)/.packages: $(VENV)/.made requirements.lock requirements-source.lock
	$(PYTHON) -m pip install --quiet --require-hashes --only-binary :all: -r requirements.lock
	$(PYTHON) -m pip install --quiet --require-hashes --no-deps --no-build-isolation -r requirements-source.lock
	@touch $@

$(VENV)/.engine: $(VENV)/.packages $(ENGINE_SOURCES)
	PIP_QUIET=1 VIRTUAL_ENV=$(CURDIR)/$(VENV) $(VENV)/bin/maturin develop --locked --release --quiet
	@touch $@
