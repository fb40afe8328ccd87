# Everything runs in this folder's own virtual environment, pinned by constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo demo-full demo-flux demo-sd3 test test-unit lint types docs faults clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	# torch first and pinned: a range would bring several GB of CUDA packages to machines without a GPU.
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

# Compresses the demo teacher into runs/demo.
demo: setup
	$(BIN)/ppcl compress demo/demo.yaml

# The same with fine-tuning in full, into runs/demo-full.
demo-full: setup
	$(BIN)/ppcl compress demo/demo-full.yaml

# The small trained FLUX.1 and Stable Diffusion 3.5, into runs/flux and runs/sd3.
demo-flux demo-sd3: demo-%: setup
	$(BIN)/ppcl compress demo/$*.yaml

# Two processes: files of tests go to them whole, since what is costly is shared within a file, and in the order of
# tests/conftest.py, which has the longest first.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# All but the fault tests: style, imports and types, then the unit and integration tests; prints the slowest twenty.
test: lint types
	$(PYTEST) --durations=20

# The tests that need no process, socket or browser.
test-unit: setup
	$(PYTEST) -m "not integration and not faults"

lint: setup
	$(BIN)/ruff check ppcl jobs serve tests benchmarks
	$(BIN)/ruff format --check ppcl jobs serve tests benchmarks docs
	$(BIN)/lint-imports

# The type checker, over the whole program.
types: setup
	$(BIN)/mypy

# Whole jobs with killed and stopped processes and damaged files; as root also on two hosts. Half an hour on 2 cores.
faults: setup
	$(BIN)/python -m pytest -q -m faults tests/faults

# Generates the references, then builds the pages into site/.
docs: setup
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build site *.egg-info
