# Everything runs in this folder's own virtual environment, pinned by constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test faults docs clean

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

test: setup
	$(BIN)/ruff check ppcl jobs serve tests
	$(BIN)/python -m pytest -q

# Processes killed, stopped and spoilt in whole jobs; root lets it have two hosts, too. Half an hour on 2 cores.
faults: setup
	$(BIN)/python -m pytest -q -m faults tests/faults

# The references anew, then the pages, into site/.
docs: setup
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build site *.egg-info
