# make demo · make test · make lint · make bench · make docs: each sets up .venv first.
# With a GPU: make gpu-test · make gpu.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench docs gpu-test gpu report clean

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/python -m demo.run

test: .venv/installed  # a process a core, of one thread each: threads of several processes wait for each other
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python -m pytest benchmarks --benchmark-only

.venv/docs-installed: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

docs: .venv/docs-installed  # build/docs/index.html; a warning is an error
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs build/docs

HERE := $(if $(wildcard .venv/installed),$(BIN)/python,$(PYTHON))

gpu-test:  # these with the packages that the GPU machine has: nothing is installed there
	$(HERE) -m benchmarks.gpu.bring_up

gpu:
	$(HERE) -m benchmarks.gpu

report:
	$(HERE) -m benchmarks.gpu.report

clean:
	rm -rf .venv build dist *.egg-info
