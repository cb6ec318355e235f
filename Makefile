# Everything here works in a fresh clone with python3 (3.11 or newer) and nothing else: each target makes and updates
# .venv as far as it needs it. Pass options on with ARGS, as in `make run ARGS="--http-port 0"`.

PYTHONS = $(PYTHON) python3 python3.13 python3.12 python3.11 python3.14
BIN     = .venv/bin
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check
UV      = $(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes \
          --no-annotate --no-header --no-emit-index-url --no-emit-find-links
SOURCES = pipeline consumers

.DEFAULT_GOAL = help
.PHONY: help run demo test browser-test report check format house bench upgrade chaos soak lock clean

help:
	@echo 'make run      serve on this machine: broker, engines, gateway (headrace up)'
	@echo 'make demo     overload a pipeline for thirty seconds and watch it cope'
	@echo 'make test     the tests'
	@echo 'make report   the acceptance checks, and a table of what each measured'
	@echo 'make browser-test   the dashboard in headless Chromium, where there is one'
	@echo 'make check    style, types and import contracts'
	@echo 'make format   put the style right where a tool can'
	@echo 'make house    the import graph in figures (--rev REV to compare)'
	@echo 'make bench    the benchmarks'
	@echo 'make upgrade  an older version stores and serves, this one takes over its state (--from REV)'
	@echo 'make chaos    kill every part under load for ten minutes, and count (--engine mlx, --seconds N, --show NAME)'
	@echo 'make soak     the same for an hour, or as long as one likes'
	@echo 'make lock     choose and hash the requirements anew'
	@echo 'make clean    remove what the above made, .venv included'

run: .venv/run
	@exec $(BIN)/headrace up $(ARGS)

demo: .venv/run
	@exec $(BIN)/headrace demo $(ARGS)

test: .venv/dev
	@$(BIN)/python -m pytest -q $(ARGS)

report: .venv/dev
	@$(BIN)/python -m pytest -q tests/acceptance --report $(ARGS)

browser-test: .venv/browser
	@$(BIN)/python -m pytest -q -m browser tests/browser $(ARGS)

chaos: .venv/dev
	@$(BIN)/python -m bench.chaos $(ARGS)

soak: .venv/dev
	@$(BIN)/python -m bench.chaos --seconds 3600 $(ARGS)

house: .venv/dev
	@$(BIN)/python -m bench.house $(ARGS)

upgrade: .venv/dev
	@$(BIN)/python -m bench.upgrade $(ARGS)

bench: .venv/dev
	@$(BIN)/python -m bench $(ARGS)

check: .venv/dev
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-logo

format: .venv/dev
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

lock: .venv/made
	@$(PIP) --upgrade uv
	@echo '# What headrace runs on, and what builds it. Made by `make lock`.' > requirements.txt.new
	@$(UV) --upgrade --group build >> requirements.txt.new
	@mv requirements.txt.new requirements.txt
	@echo '# What headrace is developed with, requirements.txt included. Made by `make lock`.' > requirements-dev.txt.new
	@$(UV) --upgrade --group build --group dev --constraint requirements.txt >> requirements-dev.txt.new
	@mv requirements-dev.txt.new requirements-dev.txt
	@echo '# What drives the browser of `make browser-test`. Made by `make lock`.' > requirements-browser.txt.new
	@$(filter-out pyproject.toml,$(UV)) --upgrade --group browser --constraint requirements-dev.txt \
	  >> requirements-browser.txt.new
	@mv requirements-browser.txt.new requirements-browser.txt

clean:
	@rm -rf .venv build dist .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find $(SOURCES) tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# The stamps say what is installed: `run` what headrace needs, `dev` all there is.

.venv/run: .venv/made requirements.txt pyproject.toml
	@echo 'Installing what headrace needs into .venv (once) ...'
	@$(PIP) --require-hashes -r requirements.txt
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

.venv/dev: .venv/run requirements-dev.txt
	@echo 'Installing what its development needs into .venv (once) ...'
	@$(PIP) --require-hashes -r requirements-dev.txt
	@touch $@

.venv/browser: .venv/dev requirements-browser.txt
	@echo 'Installing what drives a browser into .venv (once) ...'
	@$(PIP) --require-hashes -r requirements-browser.txt
	@touch $@

.venv/made:
	@for python in $(PYTHONS); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    "$$python" -m venv .venv && touch $@; exit; \
	  fi; \
	done; \
	echo 'headrace needs Python 3.11 or newer, and found none among: $(PYTHONS).' >&2; \
	echo 'Name one with: make PYTHON=/path/to/python3' >&2; \
	exit 1
