# Every target works in a fresh clone with python3 (3.11 or newer); each creates or updates the part of .venv that it
# needs. Pass options with ARGS: `make run ARGS="--http-port 0"`.

PYTHONS = $(PYTHON) python3 python3.13 python3.12 python3.11 python3.14
BIN     = .venv/bin
# The user's settings name the index. Those of other places to install to are not for .venv.
PIP     = PIP_USER=0 PIP_TARGET= PIP_PREFIX= PIP_ROOT= $(BIN)/python -m pip install --disable-pip-version-check
UV      = $(shell command -v uv || echo $(BIN)/uv)
COMPILE = $(UV) pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes \
          --no-annotate --no-header --no-emit-index-url --no-emit-find-links
SOURCES = pipeline consumers

# A pipeline starts a dozen processes and the tests start hundreds. Without stored bytecode, each compiles all that it
# imports, which doubles its start. Where the environment wants none beside the sources, it is stored in .venv.
ifdef PYTHONDONTWRITEBYTECODE
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX = $(CURDIR)/.venv/bytecode
endif

.DEFAULT_GOAL = help
.PHONY: help run demo test real browser-test report clients check format house bench security upgrade chaos store soak lock clean

help:
	@echo 'make run      run broker, engines and gateway on this machine (headrace up)'
	@echo 'make demo     overload a separate pipeline for thirty seconds and show what happens'
	@echo 'make test     run the tests'
	@echo 'make real     run the tests of the default model and the second engine, and print a report'
	@echo 'make report   run the acceptance checks and print a table of their measurements'
	@echo 'make clients  install real clients and run each against a running pipeline (needs a network; --only NAME, --write)'
	@echo 'make browser-test   test the dashboard in headless Chromium, if it is installed'
	@echo 'make check    check style, types and import contracts'
	@echo 'make format   fix the style where a tool can'
	@echo 'make house    print figures of the import graph (--rev REV to compare)'
	@echo 'make security try what each user of the broker can do, and print a table'
	@echo 'make bench    run the benchmarks'
	@echo 'make upgrade  store requests with an older version and answer them with this one (--from REV)'
	@echo 'make chaos    kill parts under load for ten minutes and check every answer (--engine mlx, --seconds N, --show NAME)'
	@echo 'make store    fill the disk of the store, and damage each of its files in turn (Linux; root for a small disk)'
	@echo 'make soak     the same for an hour (--seconds N)'
	@echo 'make lock     update and hash the pinned requirements'
	@echo 'make clean    remove all build products, including .venv'

run: .venv/run
	@exec $(BIN)/headrace up $(ARGS)

demo: .venv/run
	@exec $(BIN)/headrace demo $(ARGS)

test: .venv/dev
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

real: .venv/dev
	@$(BIN)/python -m pytest -q -m "real and not slow" tests/real $(ARGS)

report: .venv/dev
	@$(BIN)/python -m pytest -q tests/acceptance --report $(ARGS)

clients: .venv/dev
	@$(BIN)/python -m tests.clients $(ARGS)

browser-test: .venv/browser
	@$(BIN)/python -m pytest -q -m browser tests/browser $(ARGS)

chaos: .venv/dev
	@$(BIN)/python -m bench.chaos $(ARGS)

store: .venv/dev
	@$(BIN)/python -m pytest -q -rs -s -m "slow or not slow" tests/e2e/test_store.py tests/pipeline/up/test_mending.py $(ARGS)

soak: .venv/dev
	@$(BIN)/python -m bench.chaos --seconds 3600 $(ARGS)

house: .venv/dev
	@$(BIN)/python -m bench.house $(ARGS)

upgrade: .venv/dev
	@$(BIN)/python -m bench.upgrade $(ARGS)

security: .venv/dev
	@$(BIN)/python -m pytest -q -s tests/security $(ARGS)

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
	@$(PIP) --quiet --upgrade uv
	@echo '# The installer of the others. Written by `make lock`.' > requirements-uv.txt.new
	@echo uv | $(filter-out pyproject.toml,$(COMPILE)) - --upgrade >> requirements-uv.txt.new
	@mv requirements-uv.txt.new requirements-uv.txt
	@echo '# The requirements to run and build headrace. Written by `make lock`.' > requirements.txt.new
	@$(COMPILE) --upgrade --group build >> requirements.txt.new
	@mv requirements.txt.new requirements.txt
	@echo '# The requirements to develop headrace, including requirements.txt. Written by `make lock`.' > requirements-dev.txt.new
	@$(COMPILE) --upgrade --group build --group dev --constraint requirements.txt >> requirements-dev.txt.new
	@mv requirements-dev.txt.new requirements-dev.txt
	@echo '# The requirements of `make browser-test`. Written by `make lock`.' > requirements-browser.txt.new
	@$(filter-out pyproject.toml,$(COMPILE)) --upgrade --group browser --constraint requirements-dev.txt \
	  >> requirements-browser.txt.new
	@mv requirements-browser.txt.new requirements-browser.txt

clean:
	@rm -rf .venv build dist .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find $(SOURCES) tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# The stamps record what is installed: `run` the requirements of headrace, `dev` those of its development as well.

# $(call install,ARGUMENTS): by uv, and by pip where uv cannot be had or fails. uv reads no settings of pip, so it gets
# pip's index from here.
pip_setting = $(BIN)/python -m pip config get $(1) 2>/dev/null
define install
	@index="$${UV_DEFAULT_INDEX:-$${UV_INDEX_URL:-$${PIP_INDEX_URL:-$$($(call pip_setting,global.index-url) || $(call pip_setting,install.index-url) || true)}}}"; \
	if [ -n "$$index" ]; then UV_DEFAULT_INDEX="$$index"; export UV_DEFAULT_INDEX; fi; \
	if [ -x "$(UV)" ] && "$(UV)" pip install --python $(BIN)/python $(1); then exit; fi; \
	$(PIP) $(1)
endef

.venv/run: .venv/made requirements.txt pyproject.toml
	@echo 'Installing the requirements of headrace into .venv (once) ...'
	$(call install,--require-hashes -r requirements.txt)
	$(call install,--quiet --no-deps --no-build-isolation --editable .)
	@touch $@

.venv/dev: .venv/run requirements-dev.txt
	@echo 'Installing the development requirements into .venv (once) ...'
	$(call install,--require-hashes -r requirements-dev.txt)
	@touch $@

.venv/browser: .venv/dev requirements-browser.txt
	@echo 'Installing the browser driver into .venv (once) ...'
	$(call install,--require-hashes -r requirements-browser.txt)
	@touch $@

.venv/made:
	@for python in $(PYTHONS); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    "$$python" -m venv .venv || exit; \
	    command -v uv >/dev/null || $(PIP) --quiet --require-hashes -r requirements-uv.txt || true; \
	    touch $@; exit; \
	  fi; \
	done; \
	echo 'headrace needs Python 3.11 or newer. None of these is: $(PYTHONS).' >&2; \
	echo 'Name one: make PYTHON=/path/to/python3' >&2; \
	exit 1
