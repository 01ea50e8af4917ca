# make demo · make test · make test-all · make lint · make bench · make docs: each sets up .venv first.
# With a GPU: make gpu-test · make gpu.
PYTHON ?= python3
BIN := .venv/bin
# Python compiles what is imported and keeps it, also where the environment says not to, since every process would else
# compile torch again for seconds; that pip compiles all modules of all packages takes a third of the set-up.
export PYTHONDONTWRITEBYTECODE :=
INSTALL := install --quiet --no-compile --disable-pip-version-check
PIP := $(BIN)/python -m pip $(INSTALL)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all test-oldest lint bench docs gpu-test gpu report clean

# The newest pip, with that of Python 3.11 all that follows takes a minute longer. Python's own pip fetches it in a third
# of the time that a venv needs for its own; where there is none, or one without --python, the venv's does.
.venv/pip:
	$(PYTHON) -m venv --without-pip .venv && $(PYTHON) -m pip --python .venv $(INSTALL) pip \
		|| ($(PYTHON) -m venv .venv && $(PIP) --upgrade pip)
	touch $@

# With --jobs 2 these two go beside each other: halves that take equally long. Neither need succeed.
FIRST_HALF := ^[a-n]
.venv/a-to-n: .venv/pip
	grep -E '$(FIRST_HALF)' constraints.txt >$@
	-$(PIP) --no-deps --requirement $@

.venv/o-to-z: .venv/pip
	grep -vE '$(FIRST_HALF)' constraints.txt >$@
	-$(PIP) --no-deps --requirement $@

# The versions of constraints.txt; where the index no longer has one of them, the newest that pyproject.toml allows.
.venv/installed: pyproject.toml constraints.txt .venv/a-to-n .venv/o-to-z
	$(PIP) --constraint constraints.txt --editable '.[dev]' \
		|| (echo 'constraints.txt cannot be met here: installing the newest versions' && $(PIP) --editable '.[dev]')
	touch $@

demo: .venv/installed
	$(BIN)/python -m demo.run

test: .venv/installed  # one process for each core, of one thread: threads of several processes wait for each other
	$(PYTEST) -m 'not slow'

test-all: .venv/installed  # with those that take longer than CI has time for
	$(PYTEST)

# The oldest versions lie in front of the others, of which those of .venv are used.
build/oldest: oldest.txt .venv/installed
	rm -rf $@
	$(PIP) --no-deps --target $@ --requirement oldest.txt

test-oldest: build/oldest  # what depends on the versions of torch and Triton most, with the oldest that are supported
	PYTHONPATH=$(CURDIR)/build/oldest $(PYTEST) -m 'not slow' tests/kernels tests/model tests/deploy/fusion

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

bench: .venv/installed
	$(BIN)/python -m pytest benchmarks --benchmark-only

.venv/docs-installed: .venv/installed
	$(PIP) --editable '.[docs]'
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
	rm -rf .venv build dist docs/api *.egg-info
