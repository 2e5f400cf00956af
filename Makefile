# Every target does its own set-up; the first run takes some minutes, a second one a moment.
BIN := .venv/bin

.PHONY: help setup paper demo test test-all check lint bench clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: ## .venv with every version pinned
	@infra/setup.sh

paper: setup ## the whole road once, ending with the table and the page's path; full=true: as the README's table is made
	@$(BIN)/python -m jobs.paper $(if $(filter true,$(full)),--full)

demo: setup ## the first journey: videos, latent cache, initial noise, and what they hold
	@for job in make_shapes build_cache initial_noise show_cache; do \
		$(BIN)/python -m jobs.$$job --config jobs/configs/demo.yaml || exit; done

FAST := -m "not slow" -n 2 --dist loadfile

test: setup ## the fast tests, the whole road, and processes that are killed on it: what CI runs
	@$(BIN)/python -m pytest $(FAST)
	@$(BIN)/python -m pytest -m slow tests/jobs/test_road.py tests/e2e/test_kills.py --durations 10

test-all: setup ## all tests: families, S3, nodes, clusters, networks that fail as well
	@$(BIN)/python -m pytest $(FAST)
	@# The longest first: tests/e2e, of which tests/conftest.py makes one lot.
	@$(BIN)/python -m pytest -m slow -n 2 --dist loadfile --no-loadscope-reorder --durations 40

check: lint ## lint, and the fast tests
	$(BIN)/python -m pytest $(FAST)

lint: setup ## format, lint, types, import floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict cil
	$(BIN)/mypy pipelines jobs
	$(BIN)/lint-imports

bench: setup ## all benchmarks, into benchmarks/results.md
	@$(BIN)/python -m benchmarks

clean: ## remove what set-up and checks have made; outputs/ stays
	rm -rf .venv build *.egg-info .*_cache .hypothesis
