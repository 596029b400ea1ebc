# `make help` lists what there is. Every target sets up what it needs first; once that is done, it takes no time.

SHELL := /bin/sh
PYTHON_ENV := .venv/bin/python
TFLITE_ENV := .venv-tflite/bin/python
FUZZ_ENV := .venv-fuzz/bin/python
CODE := protocol edge_agent trainer_host demo benchmarks tests scripts
AGENT_TESTS := tests/unit/protocol tests/unit/edge_agent tests/integration/test_agent.py tests/integration/test_stager.py \
	tests/integration/test_sideload.py tests/integration/test_hostile_models.py

# For `make simulate`.
SEEDS ?= 10000
FROM ?= 0
# For `make kill-campaign`.
KILLS ?= 1000

.DEFAULT_GOAL := help
.PHONY: help setup setup-bench demo test test-main test-tflite fuzz simulate simulate-mutants kill-campaign \
	coverage-own lint format bench lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install Mosquitto and the locked Python environments into this folder; says what it does
	@scripts/setup.sh

setup-bench: setup
	@scripts/setup.sh bench

demo: setup ## the whole loop, live in this terminal; DEMO_FLAGS="--seed 7 --keep"
	@$(PYTHON_ENV) -m demo $(DEMO_FLAGS)

test: test-main test-tflite ## all tests, then the agent's again on tflite-runtime

test-main: setup
	@$(PYTHON_ENV) -m pytest $(PYTEST_FLAGS)

test-tflite: setup ## the agent's tests in the environment of tflite-runtime (Linux, Python 3.11)
	@if [ -x $(TFLITE_ENV) ]; then \
		$(TFLITE_ENV) -m pytest $(AGENT_TESTS) $(PYTEST_FLAGS); \
	else \
		echo "Skipped the tests on tflite-runtime: it exists for Linux with Python 3.11 only."; \
	fi

fuzz: setup ## coverage-guided fuzzing of every decoder (Linux); SECONDS=600 for all together
	@test -x $(FUZZ_ENV) || .venv/bin/python -m venv .venv-fuzz
	@$(FUZZ_ENV) -m pip install --quiet --disable-pip-version-check --requirement requirements/fuzz.txt
	@$(FUZZ_ENV) -m tests.fuzz --seconds $(or $(SECONDS),60)

coverage-own: setup ## each pure module covered to 100% by its own test file
	@$(PYTHON_ENV) scripts/coverage_own.py

lint: setup ## style, types, import contracts, and whether the diagram in the docs is the code's
	@.venv/bin/ruff check $(CODE)
	@.venv/bin/ruff format --check $(CODE)
	@.venv/bin/mypy
	@.venv/bin/lint-imports
	@$(PYTHON_ENV) scripts/state_diagram.py --check docs/design.md

format: setup ## mend what can be mended without thinking
	@.venv/bin/ruff check --fix $(CODE)
	@.venv/bin/ruff format $(CODE)

simulate: setup ## one device in a hostile world, SEEDS=10000 times from FROM=0 on; ONE=17 shows what happens in one
	@$(PYTHON_ENV) -m tests.simulation.device $(if $(ONE),--seed $(ONE),--seeds $(SEEDS) --from $(FROM))

simulate-mutants: setup ## is it noticed when a sync, a check or a counter is taken out of the code?
	@$(PYTHON_ENV) -m tests.simulation.device --mutants --remember

kill-campaign: setup ## kill -9 of every process at random while models change, KILLS=1000 times
	@$(PYTHON_ENV) -m tests.campaign.kills --kills $(KILLS)

bench: setup-bench ## one table of figures against their yardsticks; BENCH_FLAGS="--quick"
	@$(PYTHON_ENV) -m benchmarks $(BENCH_FLAGS)

lock: setup ## resolve the dependencies anew into requirements/*.lock
	@scripts/lock.sh

clean: ## remove everything that set-up, tests and benchmarks made in this folder
	rm -rf .venv .venv-tflite .venv-fuzz build dist *.egg-info run benchmarks/build .coverage \
		.pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
