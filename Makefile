# On a fresh machine with Python 3.11, git and make, every target first installs what it needs into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: install demo test lint bench

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	uv --version >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet uv
	PATH="$$PATH:$(CURDIR)/$(BIN)" uv pip install --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/omniadapt compare quickstart --methods probe,lora,cloud_adapter,full --seeds 0,1

# AdapterHub's library asks for an older transformers than ours, so its tests have an environment beside.
.venv/adapterhub/installed: .venv/installed
	$(BIN)/python -m venv --without-pip .venv/adapterhub
	PATH="$$PATH:$(CURDIR)/$(BIN)" uv pip install --python .venv/adapterhub/bin/python adapters==1.3.0 transformers==4.57.6 $$(grep '^torch==' constraints.txt)
	touch $@

test: install .venv/adapterhub/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: install
	$(BIN)/python -m tests.benchmarks
